//! `config.json` and the processor's files of Idefics3, SmolVLM and SmolVLM2.
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::config_keys;
use crate::front::decoder::DecoderConfig;
use crate::front::processor::{Filter, Normalisation, ProcessorFile};
use crate::front::tower::{TowerArch, TowerConfig};

/// A checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Idefics3 {
    pub text: DecoderConfig,
    pub vision: TowerConfig,
    /// So many patches in a row and so many rows of them become one token.
    pub scale_factor: usize,
    /// The longer side of a picture before it is cut into tiles of the tower's size, pixels.
    pub longest_edge: usize,
    pub normalisation: Normalisation,
    /// What the user should know about how the configuration was read.
    pub notes: Vec<String>,
}

impl Idefics3 {
    /// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file, path: String::new(), json: checkpoint.config() };
        config_keys::check(&c, config_keys::IDEFICS3)?;
        let (text, note) = DecoderConfig::of_checkpoint(checkpoint, &c)?;
        let v = c.section("vision_config")?;
        let vision = TowerConfig::read(&v, -1)?;
        if vision.arch != TowerArch::Siglip {
            return Err(v.invalid("model_type", "idefics3_vision or smolvlm_vision").into());
        }
        vision.check_mlp(&v)?;
        let scale_factor = c.size_opt("scale_factor")?.unwrap_or(2);
        if !vision.grid().is_multiple_of(scale_factor) {
            return Err(c.invalid("scale_factor", "a divisor of image_size / patch_size").into());
        }
        check_tokens(checkpoint, (vision.grid() / scale_factor).pow(2))?;
        let processor = ProcessorFile::read(checkpoint)?;
        let p = processor.section();
        let longest_edge = read_tiles(&p, vision.image_size)?;
        let normalisation = Normalisation::read(&p, Filter::Lanczos)?;
        text.check_blocks(checkpoint, "text_config.num_hidden_layers")?;
        vision.check_blocks(checkpoint)?;
        Ok(Idefics3 { text, vision, scale_factor, longest_edge, normalisation, notes: note.into_iter().collect() })
    }
}

/// Checks that the processor writes `tokens` of them for a tile.
fn check_tokens(checkpoint: &Checkpoint, tokens: usize) -> Result<(), crate::Error> {
    let processor = ProcessorFile::outer(checkpoint)?;
    let p = processor.section();
    // transformers' default is Idefics3-8B's.
    if p.size_opt("image_seq_len")?.unwrap_or(169) != tokens {
        return Err(p.invalid("image_seq_len", "(image_size / patch_size / scale_factor)^2 of config.json").into());
    }
    Ok(())
}

/// The longer side of a picture that is cut into tiles as wide as the tower's input, `side`, pixels.
fn read_tiles(p: &Section, side: usize) -> Result<usize, ConfigError> {
    let kind = p.str_opt("image_processor_type")?.unwrap_or("Idefics3ImageProcessor");
    if !["Idefics3ImageProcessor", "SmolVLMImageProcessor"].iter().any(|known| kind.starts_with(known)) {
        return Err(p.invalid("image_processor_type", "Idefics3ImageProcessor or SmolVLMImageProcessor"));
    }
    if p.bool_opt("do_image_splitting")? == Some(false) {
        return Err(p.invalid("do_image_splitting", "true: llama.cpp cuts every picture into tiles"));
    }
    // transformers' defaults are Idefics3-8B's.
    let edge = |key: &str, default: usize| match p.get(key) {
        None => Ok(default),
        Some(_) => p.section(key)?.size_opt("longest_edge")?.ok_or_else(|| p.invalid(key, "longest_edge, pixels")),
    };
    if edge("max_image_size", 364)? != side {
        return Err(p.invalid("max_image_size", "the vision tower's image_size as longest_edge"));
    }
    let longest = edge("size", 4 * 364)?;
    if !longest.is_multiple_of(side) || longest > MAX_EDGE {
        return Err(p.invalid("size", "a multiple of max_image_size, at most 4096, as longest_edge"));
    }
    Ok(longest)
}

/// transformers makes no picture larger.
const MAX_EDGE: usize = 4096;
