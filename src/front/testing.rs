//! For tests of what stands behind the door.
use super::Source;
use super::config::Section;
use super::decoder::DecoderConfig;
use crate::checkpoint::Checkpoint;
use crate::gguf::Metadata;

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
