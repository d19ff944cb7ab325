//! Published metadata of SmolVLM and Granite Docling, with weights that are holes in a file.
use super::*;
use crate::front::config::Section;
use crate::front::decoder::DecoderConfig;
use crate::front::testing::{drop_added_tokens, hollow, json_of, published, shapes};
use crate::front::tower::TowerConfig;

/// Each opens: configuration, processor, tokenizer, template.
#[test]
fn published_checkpoints_open() {
    let Some(folders) = published(|kind| ["idefics3", "smolvlm"].contains(&kind)) else { return };
    for folder in &folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let config = json_of(folder, "config.json").unwrap();
        let c = Section { file: folder.join("config.json"), path: String::new(), json: &config };
        let text = DecoderConfig::read(&c.section("text_config").unwrap(), c.bool_opt("tie_word_embeddings").unwrap());
        let text = text.unwrap();
        let tower = TowerConfig::read(&c.section("vision_config").unwrap(), -1).unwrap();
        let shape = [text.hidden_size, tower.hidden_size * 16];
        let connector = Row::matrix("", "connector.modality_projection.proj.weight", &shape);
        let rows = [text.rows(), tower.siglip_rows(), vec![connector]].concat();
        let tokenizer = folder.parent().unwrap().join("HuggingFaceTB--SmolVLM-256M-Instruct/tokenizer.json");
        let dir = hollow(folder, &tokenizer, &shapes(&rows));
        if !folder.join("tokenizer.json").exists() {
            drop_added_tokens(dir.path());
        }
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let pair = open(&checkpoint, &name, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!pair.notes.iter().any(|note| note.contains("otherwise")), "{name}: {:?}", pair.notes);
        let vision = pair.mmproj.unwrap().metadata;
        let number = |key: &str| vision.get(key).and_then(|v| v.as_u64());
        assert_eq!(number("clip.vision.preproc_image_size"), Some(2048), "{name}");
        assert!(pair.text.metadata.str("tokenizer.chat_template").is_some_and(|t| t.contains("<image>")), "{name}");
    }
    assert!(folders.len() >= 2, "{folders:?}");
}

/// SmolVLM-Instruct and SmolVLM2-2.2B leave out sizes that transformers' class has.
#[test]
fn sizes_that_are_left_out() {
    let json = serde_json::json!({"model_type": "smolvlm_vision", "image_size": 384, "patch_size": 14, "num_hidden_layers": 27});
    let s = Section { file: "config.json".into(), path: "vision_config".into(), json: &json };
    let tower = TowerConfig::read(&s, -1).unwrap();
    assert_eq!((tower.hidden_size, tower.intermediate_size, tower.num_heads, tower.grid()), (1152, 3072, 16, 27));
    // 27 of 27: the runtime takes the last block's output, behind the last norm.
    assert_eq!(tower.used_layers, 27);
}
