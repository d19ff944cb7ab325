//! Published metadata of InternVL2 and 3, with weights that are holes in a file.
use super::*;
use crate::front::claims;
use crate::front::config::Section;
use crate::front::decoder::DecoderConfig;
use crate::front::testing::{hollow, json_of, shapes};
use serde_json::Value;
use std::path::Path;

/// The rows that the configuration asks for.
fn rows(config: &Value) -> Vec<crate::front::Row> {
    let c = Section { file: "config.json".into(), path: String::new(), json: config };
    let text = DecoderConfig::read(&c.section("llm_config").unwrap(), None).unwrap();
    let tower = InternVit::read(&c.section("vision_config").unwrap(), Layout::Original).unwrap();
    [text.rows(), tower.rows(text.hidden_size)].concat()
}

/// The published files of `name` with the configuration given, weights by the index where that is there, and the
/// vocabulary of Qwen's `tokenizer.json` as the repositories have it: `vocab.json` and `merges.txt`.
fn folder(published: &Path, name: &str, config: &Value) -> tempfile::TempDir {
    let (from, qwen) = (published.join(name), published.join("Qwen--Qwen3-tokenizer"));
    let dir = hollow(&from, &qwen.join("tokenizer.json"), &shapes(&rows(config)));
    let write = |file: &str, text: String| std::fs::write(dir.path().join(file), text).unwrap();
    // Some are published as a configuration only; the processor's file is the same everywhere.
    const PROCESSOR: &str = "preprocessor_config.json";
    if !from.join(PROCESSOR).exists() {
        write(PROCESSOR, json_of(&published.join("OpenGVLab--InternVL2-1B"), PROCESSOR).unwrap().to_string());
    }
    write("config.json", config.to_string());
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let bpe = &json_of(&qwen, "tokenizer.json").unwrap()["model"];
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
        let folder = published.join(name);
        json_of(&folder, "config.json").or_else(|| json_of(&folder, "config.edited.json")).unwrap()
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
