//! Published metadata of the three generations, with weights that are holes in a file.
use super::*;
use crate::front::config::Section;
use crate::front::decoder::DecoderConfig;
use crate::front::testing::{hollow, json_of, published, shapes};
use serde_json::Value;
use std::collections::BTreeSet;

/// The rows that the configuration asks for.
fn rows(config: &Value) -> Vec<crate::front::Row> {
    let c = Section { file: "config.json".into(), path: String::new(), json: config };
    let text = c.section("text_config").unwrap_or(Section { json: config, file: c.file.clone(), path: String::new() });
    let tied = [&c, &text].iter().any(|s| s.bool_opt("tie_word_embeddings").unwrap() == Some(true));
    let text = DecoderConfig::read(&text, Some(tied)).unwrap();
    let generation = Generation::of(c.str("model_type").unwrap()).unwrap();
    let tower = QwenTower::read(&c.section("vision_config").unwrap(), generation, text.hidden_size).unwrap();
    [text.rows(), tower.rows(text.hidden_size)].concat()
}

/// Each opens: configuration, processor, tokenizer, template, and every name of the index, where that is there.
#[test]
fn published_checkpoints_open() {
    let Some(folders) = published(|kind| Generation::of(kind).is_some()) else { return };
    let mut opened = BTreeSet::new();
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let tokenizer = folder.parent().unwrap().join("Qwen--Qwen3-tokenizer/tokenizer.json");
        let dir = hollow(&folder, &tokenizer, &shapes(&rows(&json_of(&folder, "config.json").unwrap())));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        match open(&checkpoint, &name, None) {
            Ok(pair) => {
                let template = pair.text.metadata.str("tokenizer.chat_template");
                assert!(template.is_some_and(|t| !t.contains("__media")), "{name}: {:?}", pair.notes);
                assert!(!pair.notes.iter().any(|note| note.contains("otherwise")), "{name}: {:?}", pair.notes);
                opened.insert(name);
            }
            // Of an embedding model, which says that its head is not the embedding, and has none.
            Err(error) => {
                assert!(name.contains("Embedding") && error.to_string().contains("lm_head"), "{name}: {error}");
            }
        }
    }
    assert!(opened.len() >= 7, "{opened:?}");
}
