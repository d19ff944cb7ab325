//! `config.json` and the processor's files of Gemma 3.
use super::text;
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::config_keys;
use crate::front::decoder::DecoderConfig;
use crate::front::processor::{Filter, Normalisation, ProcessorFile};
use crate::front::tower::{TowerArch, TowerConfig};

/// A checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemma3 {
    pub text: DecoderConfig,
    pub vision: TowerConfig,
    /// So many patches in a row and so many rows of them are averaged to one token.
    pub pooled: usize,
    pub normalisation: Normalisation,
    /// What the user should know about how the configuration was read.
    pub notes: Vec<String>,
}

impl Gemma3 {
    /// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file, path: String::new(), json: checkpoint.config() };
        config_keys::check(&c, config_keys::GEMMA3)?;
        let mut text = text::read(&c.section("text_config")?, c.bool_opt("tie_word_embeddings")?)?;
        let note = text.settle_head(checkpoint);
        let v = c.section("vision_config")?;
        let vision = TowerConfig::read(&v, -1)?;
        if vision.arch != TowerArch::Siglip || v.str("model_type")? != "siglip_vision_model" {
            return Err(v.invalid("model_type", "siglip_vision_model").into());
        }
        vision.check_mlp(&v)?;
        let tokens = c.size_opt("mm_tokens_per_image")?.unwrap_or(256);
        let side = tokens.isqrt();
        if side * side != tokens || !vision.grid().is_multiple_of(side) {
            return Err(c.invalid("mm_tokens_per_image", "the square of a divisor of image_size / patch_size").into());
        }
        let normalisation = read_processor(checkpoint, vision.image_size, tokens)?;
        text.check_blocks(checkpoint, "text_config.num_hidden_layers")?;
        vision.check_blocks(checkpoint)?;
        let pooled = vision.grid() / side;
        Ok(Gemma3 { text, vision, pooled, normalisation, notes: note.into_iter().collect() })
    }
}

/// `side` is the tower's input, pixels; a picture becomes `tokens`.
fn read_processor(checkpoint: &Checkpoint, side: usize, tokens: usize) -> Result<Normalisation, crate::Error> {
    let outer = ProcessorFile::outer(checkpoint)?;
    let outer = outer.section();
    if outer.size_opt("image_seq_length")?.unwrap_or(256) != tokens {
        return Err(outer.invalid("image_seq_length", "mm_tokens_per_image of config.json").into());
    }
    let processor = ProcessorFile::read(checkpoint)?;
    let p = processor.section();
    const CLASS: &str = "Gemma3ImageProcessor";
    if p.str_opt("image_processor_type")?.is_some_and(|kind| !kind.starts_with(CLASS)) {
        return Err(p.invalid("image_processor_type", CLASS).into());
    }
    if p.bool_opt("do_pan_and_scan")? == Some(true) {
        return Err(p.invalid("do_pan_and_scan", "false: llama.cpp shows no crops of a picture").into());
    }
    check_size(&p, side)?;
    Ok(Normalisation::read(&p, Filter::Bilinear)?)
}

/// Pictures are stretched to the square that the tower takes.
fn check_size(p: &Section, side: usize) -> Result<(), ConfigError> {
    // transformers' default.
    let (mut height, mut width) = (Some(224), Some(224));
    if p.get("size").is_some() {
        let size = p.section("size")?;
        (height, width) = (size.size_opt("height")?, size.size_opt("width")?);
    }
    if height != Some(side) || width != Some(side) {
        return Err(p.invalid("size", "the vision tower's image_size as height and width"));
    }
    Ok(())
}
