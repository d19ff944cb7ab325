//! Published metadata of Gemma 3, with weights that are holes in a file.
use super::*;
use crate::front::config::Section;
use crate::front::testing::{drop_added_tokens, hollow, json_of, published, shapes};
use crate::front::tower::TowerConfig;
use serde_json::json;
use std::path::Path;

/// Each opens: configuration, processor, template, and every name of the index, where that is there. The tokenizer is a
/// small one of the same kind, whose ids stand in config.json.
#[test]
fn published_checkpoints_open() {
    let Some(folders) = published(|kind| kind == "gemma3") else { return };
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gemma3/tokenizer.json");
    for folder in &folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut config = json_of(folder, "config.json").unwrap();
        let c = Section { file: folder.join("config.json"), path: String::new(), json: &config };
        let text = text::read(&c.section("text_config").unwrap(), None).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tower = TowerConfig::read(&c.section("vision_config").unwrap(), -1).unwrap();
        let of = |part: &str| format!("multi_modal_projector.{part}");
        let norm = Row::vector("", of("mm_soft_emb_norm.weight"), &[tower.hidden_size]);
        let linear = Row::matrix("", of("mm_input_projection_weight"), &[tower.hidden_size, text.hidden_size]);
        let rows = [text.rows(), tower.siglip_rows(), vec![norm, linear]].concat();
        let dir = hollow(folder, &tokenizer, &shapes(&rows));
        (config["boi_token_index"], config["eoi_token_index"]) = (json!(1213), json!(1214));
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        drop_added_tokens(dir.path());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let pair = open(&checkpoint, &name, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!pair.notes.iter().any(|note| note.contains("otherwise")), "{name}: {:?}", pair.notes);
        let number = |key: &str| pair.text.metadata.get(key).and_then(|v| v.as_u64());
        let is_4b = name.contains("4b");
        assert_eq!(number("gemma3.attention.head_count"), Some(if is_4b { 8 } else { 32 }), "{name}");
        assert_eq!(number("gemma3.attention.key_length"), Some(if is_4b { 256 } else { 128 }), "{name}");
        assert_eq!(number("gemma3.attention.sliding_window"), Some(1024), "{name}");
        let vision = pair.mmproj.unwrap().metadata;
        assert_eq!(vision.get("clip.vision.projector.scale_factor").and_then(|v| v.as_u64()), Some(4), "{name}");
    }
    assert!(folders.len() >= 2, "{folders:?}");
}
