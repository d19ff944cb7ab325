//! Published metadata of the three generations, with weights that are holes in a file.
use super::*;
use crate::checkpoint::canonical;
use crate::front::config::Section;
use crate::front::decoder::DecoderConfig;
use crate::front::testing::holes;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Canonical name -> shape of every tensor that the configuration asks for.
fn shapes(config: &Value) -> BTreeMap<String, Vec<usize>> {
    let c = Section { file: "config.json".into(), path: String::new(), json: config };
    let text = c.section("text_config").unwrap_or(Section { json: config, file: c.file.clone(), path: String::new() });
    let tied = [&c, &text].iter().any(|s| s.bool_opt("tie_word_embeddings").unwrap() == Some(true));
    let text = DecoderConfig::read(&text, Some(tied)).unwrap();
    let generation = Generation::of(c.str("model_type").unwrap()).unwrap();
    let tower = QwenTower::read(&c.section("vision_config").unwrap(), generation, text.hidden_size).unwrap();
    let rows = [text.rows(), tower.rows(text.hidden_size)].concat();
    rows.iter().map(|row| (row.from.clone(), row.stored_shape())).collect()
}

/// Each opens: configuration, processor, tokenizer, template, and every name of the index, where that is there.
#[test]
fn published_checkpoints_open() {
    let Some(shared) = std::env::var_os("MBQ_SHARED") else {
        return eprintln!("skipped: MBQ_SHARED is not set");
    };
    let published = Path::new(&shared).join("published");
    let mut opened = BTreeSet::new();
    for folder in std::fs::read_dir(&published).unwrap() {
        let folder = folder.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let json = |file: &str| serde_json::from_slice::<Value>(&std::fs::read(folder.join(file)).ok()?).ok();
        let Some(config) = json("config.json") else { continue };
        let known = config["model_type"].as_str().is_some_and(|kind| Generation::of(kind).is_some());
        if !known || config.get("quantization_config").is_some() {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(&folder).unwrap() {
            let file = file.unwrap().path();
            std::fs::write(dir.path().join(file.file_name().unwrap()), std::fs::read(&file).unwrap()).unwrap();
        }
        let tokenizer = published.join("Qwen--Qwen3-tokenizer/tokenizer.json");
        std::fs::copy(tokenizer, dir.path().join("tokenizer.json")).unwrap();
        let shapes = shapes(&config);
        let weights = dir.path().join("model.safetensors");
        match json("model.safetensors.index.json") {
            None => holes(&weights, shapes.iter().map(|(name, shape)| (name, shape.clone()))),
            Some(index) => {
                let names = index["weight_map"].as_object().unwrap().keys();
                let shape = |name: &String| shapes.get(&canonical(name)).unwrap_or_else(|| panic!("{name}")).clone();
                holes(&weights, names.map(|name| (name, shape(name))));
            }
        }
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
