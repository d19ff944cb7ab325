//! For tests of what stands behind the door.
use super::config::Section;
use super::decoder::DecoderConfig;
use super::{Row, Source};
use crate::checkpoint::{Checkpoint, canonical};
use crate::gguf::Metadata;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The text model of `checkpoint` alone, whatever stands in front of it.
pub(crate) fn decoder(checkpoint: &Checkpoint) -> Source<'_> {
    let outer = Section { file: checkpoint.dir().into(), path: String::new(), json: checkpoint.config() };
    let tied = outer.bool_opt("tie_word_embeddings").unwrap();
    let config = DecoderConfig::read(&outer.section("text_config").unwrap(), tied).unwrap();
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", config.architecture());
    config.write(&mut metadata);
    Source::renamed(checkpoint, metadata, config.rows()).unwrap()
}

/// Canonical name -> shape of the tensors of `rows`.
pub(crate) fn shapes(rows: &[Row]) -> BTreeMap<String, Vec<usize>> {
    rows.iter().map(|row| (row.from.clone(), row.stored_shape())).collect()
}

/// A bfloat16 file of zeros that takes no room.
fn holes<'n>(path: &Path, tensors: impl Iterator<Item = (&'n String, Vec<usize>)>) {
    let (mut header, mut at) = (Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let header = Value::Object(header).to_string().into_bytes();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + at) as u64).unwrap();
}

/// A JSON file of a folder, if it is there.
pub(crate) fn json_of(folder: &Path, file: &str) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(folder.join(file)).ok()?).ok()
}

/// The folders of published metadata whose model_type `is_ours`; none: MBQ_SHARED names no folder with `published/`.
pub(crate) fn published(is_ours: impl Fn(&str) -> bool) -> Option<Vec<PathBuf>> {
    let Some(shared) = std::env::var_os("MBQ_SHARED") else {
        eprintln!("skipped: MBQ_SHARED is not set");
        return None;
    };
    let folders = std::fs::read_dir(Path::new(&shared).join("published")).unwrap().map(|folder| folder.unwrap().path());
    let of = |folder: &PathBuf| {
        let config = json_of(folder, "config.json")?;
        let ours = config["model_type"].as_str().is_some_and(&is_ours);
        (ours && config.get("quantization_config").is_none()).then_some(())
    };
    Some(folders.filter(|folder| of(folder).is_some()).collect())
}

/// A checkpoint with the published files of `folder`, another's `tokenizer` where it has none, and weights that are holes: of
/// every name in its index, or else of all in `shapes`.
pub(crate) fn hollow(folder: &Path, tokenizer: &Path, shapes: &BTreeMap<String, Vec<usize>>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(folder).unwrap() {
        let file = file.unwrap().path();
        std::fs::write(dir.path().join(file.file_name().unwrap()), std::fs::read(&file).unwrap()).unwrap();
    }
    if !dir.path().join("tokenizer.json").exists() {
        std::fs::write(dir.path().join("tokenizer.json"), std::fs::read(tokenizer).unwrap()).unwrap();
    }
    let weights = dir.path().join("model.safetensors");
    match json_of(folder, "model.safetensors.index.json") {
        None => holes(&weights, shapes.iter().map(|(name, shape)| (name, shape.clone()))),
        Some(index) => {
            let names = index["weight_map"].as_object().unwrap().keys();
            let shape = |name: &String| shapes.get(&canonical(name)).unwrap_or_else(|| panic!("{name}")).clone();
            holes(&weights, names.map(|name| (name, shape(name))));
        }
    }
    dir
}

/// Drops the tokens that `tokenizer_config.json` adds: the tokenizer is another's.
pub(crate) fn drop_added_tokens(dir: &Path) {
    const FILE: &str = "tokenizer_config.json";
    let Some(mut config) = json_of(dir, FILE) else { return };
    config.as_object_mut().unwrap().remove("added_tokens_decoder");
    std::fs::write(dir.join(FILE), config.to_string()).unwrap();
}
