//! For tests of what stands behind the door.
use super::Source;
use super::config::Section;
use super::decoder::DecoderConfig;
use crate::checkpoint::Checkpoint;
use crate::gguf::Metadata;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

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

/// A bfloat16 file of zeros that takes no room.
pub(crate) fn holes<'n>(path: &Path, tensors: impl Iterator<Item = (&'n String, Vec<usize>)>) {
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
