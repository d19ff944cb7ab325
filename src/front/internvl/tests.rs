//! Published metadata of InternVL2 and 3, with weights that are holes in a file.
use super::*;
use crate::checkpoint::canonical;
use crate::front::config::Section;
use crate::front::decoder::DecoderConfig;
use crate::front::testing::holes;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Canonical name -> shape of every tensor that the configuration asks for.
fn shapes(config: &Value) -> BTreeMap<String, Vec<usize>> {
    let c = Section { file: "config.json".into(), path: String::new(), json: config };
    let text = DecoderConfig::read(&c.section("llm_config").unwrap(), None).unwrap();
    let tower = InternVit::read(&c.section("vision_config").unwrap(), Layout::Original).unwrap();
    let rows = [text.rows(), tower.rows(text.hidden_size)].concat();
    rows.iter().map(|row| (row.from.clone(), row.stored_shape())).collect()
}

/// The published files of `name` with the configuration given, weights by the index where that is there, and the
/// vocabulary of Qwen's `tokenizer.json` as the repositories have it: `vocab.json` and `merges.txt`.
fn folder(published: &Path, name: &str, config: &Value) -> tempfile::TempDir {
    let from = published.join(name);
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(&from).unwrap() {
        let file = file.unwrap().path();
        std::fs::write(dir.path().join(file.file_name().unwrap()), std::fs::read(&file).unwrap()).unwrap();
    }
    // Some are published as a configuration only; the processor's file is the same everywhere.
    let write = |file: &str, text: String| std::fs::write(dir.path().join(file), text).unwrap();
    let read = |path: PathBuf| serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap();
    if !from.join("preprocessor_config.json").exists() {
        write(
            "preprocessor_config.json",
            read(published.join("OpenGVLab--InternVL2-1B/preprocessor_config.json")).to_string(),
        );
    }
    write("config.json", config.to_string());
    let shapes = shapes(config);
    let index = from.join("model.safetensors.index.json");
    let weights = dir.path().join("model.safetensors");
    if index.exists() {
        let index = read(index);
        let names = index["weight_map"].as_object().unwrap().keys();
        holes(&weights, names.map(|n| (n, shapes.get(&canonical(n)).unwrap_or_else(|| panic!("{n}")).clone())));
    } else {
        holes(&weights, shapes.iter().map(|(name, shape)| (name, shape.clone())));
    }
    let bpe = &read(published.join("Qwen--Qwen3-tokenizer/tokenizer.json"))["model"];
    let merge = |m: &Value| {
        m.as_str().map_or_else(|| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()), String::from)
    };
    let merges: Vec<String> = bpe["merges"].as_array().unwrap().iter().map(merge).collect();
    write("vocab.json", bpe["vocab"].to_string());
    write("merges.txt", merges.join("\n"));
    dir
}

#[test]
fn published_checkpoints_open() {
    let Some(shared) = std::env::var_os("MBQ_SHARED") else {
        return eprintln!("skipped: MBQ_SHARED is not set");
    };
    let published = Path::new(&shared).join("published");
    let config = |name: &str| -> Value {
        let file = ["config.json", "config.edited.json"].map(|file| published.join(name).join(file));
        let file = file.iter().find(|file| file.exists()).unwrap();
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    };
    let open_folder = |name: &str, config: &Value| {
        let dir = folder(&published, name, config);
        let checkpoint = crate::checkpoint::Checkpoint::open(dir.path()).unwrap();
        let model = InternVl::read(&checkpoint)?;
        let pair = open(&checkpoint, name, None)?;
        Ok::<_, crate::Error>((
            model,
            pair.notes,
            pair.text.metadata.str("tokenizer.chat_template").unwrap().to_string(),
        ))
    };
    let (model, notes, template) = open_folder("OpenGVLab--InternVL2-1B", &config("OpenGVLab--InternVL2-1B")).unwrap();
    assert_eq!((model.tiles, model.tower.grid()), (TileLimits { min: 1, max: 12 }, 32));
    assert!(template.contains("You are a helpful assistant.") && template.contains("__media"), "{notes:?}");
    // The published vision_config is that of a third party's tower.
    let mut three = config("OpenGVLab--InternVL3-2B");
    three["vision_config"] = config("OpenGVLab--InternVL2-1B")["vision_config"].clone();
    let (_, notes, template) = open_folder("OpenGVLab--InternVL3-2B", &three).unwrap();
    assert!(template.contains("书生·万象") && notes.iter().any(|n| n.contains("beyond 32768 tokens")), "{notes:?}");
    assert!(!notes.iter().any(|note| note.contains("otherwise")), "{notes:?}");
    // InternLM2: all but the vocabulary, which is SentencePiece's own file.
    for name in ["OpenGVLab--InternVL2-2B", "OpenGVLab--InternVL2-8B"] {
        let dir = folder(&published, name, &config(name));
        let checkpoint = crate::checkpoint::Checkpoint::open(dir.path()).unwrap();
        let model = InternVl::read(&checkpoint).unwrap();
        let rows = [model.text.rows(), model.tower.rows(model.text.hidden_size)].concat();
        claims::check(&checkpoint, rows.iter(), &|_| false).unwrap();
        let error = open(&checkpoint, name, None).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
    let phi = config("OpenGVLab--InternVL2-4B");
    let mut one = config("OpenGVLab--InternVL2-1B");
    let dir = folder(&published, "OpenGVLab--InternVL2-4B", &one);
    one["llm_config"] = phi["llm_config"].clone();
    std::fs::write(dir.path().join("config.json"), one.to_string()).unwrap();
    let checkpoint = crate::checkpoint::Checkpoint::open(dir.path()).unwrap();
    let error = open(&checkpoint, "InternVL2-4B", None).err().unwrap().to_string();
    assert!(error.contains("llm_config.model_type: phi3"), "{error}");
}
