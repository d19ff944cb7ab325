//! `config.json` and the image processor, in both layouts.
use super::tower::{InternVit, Layout};
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::decoder::DecoderConfig;
use crate::front::processor::{Filter, Normalisation, ProcessorFile};
use crate::front::{claims, config_keys};

/// How many tiles a picture may be cut into; a thumbnail comes on top of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileLimits {
    pub min: usize,
    pub max: usize,
}

/// A checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct InternVl {
    pub text: DecoderConfig,
    pub tower: InternVit,
    pub tiles: TileLimits,
    pub normalisation: Normalisation,
    /// What the user should know about how the configuration was read.
    pub notes: Vec<String>,
}

impl InternVl {
    /// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file, path: String::new(), json: checkpoint.config() };
        let (layout, table, llm) = match c.str("model_type")? {
            "internvl_chat" => (Layout::Original, config_keys::INTERNVL_CHAT, "llm_config"),
            _ => (Layout::Transformers, config_keys::INTERNVL, "text_config"),
        };
        config_keys::check(&c, table)?;
        let (text, mut notes) = DecoderConfig::of_section(checkpoint, &c, &c.section(llm)?)?;
        let tower = InternVit::read(&c.section("vision_config")?, layout)?;
        notes.extend(tower.note());
        let key = match layout {
            Layout::Original => "llm_config.num_hidden_layers",
            Layout::Transformers => "text_config.num_hidden_layers",
        };
        text.check_blocks(checkpoint, key)?;
        let (key, layers) = ("vision_config.num_hidden_layers", tower.num_layers);
        claims::blocks(checkpoint, key, layers, InternVit::blocks(layout), [layers; 2])?;
        let processor = ProcessorFile::read(checkpoint)?;
        let p = processor.section();
        let tiles = match layout {
            Layout::Original => original_tiles(&c, &tower)?,
            Layout::Transformers => transformers_tiles(&p, &tower)?,
        };
        Ok(InternVl { text, tower, tiles, normalisation: Normalisation::read(&p, Filter::Bicubic)?, notes })
    }
}

/// As the model cards' `load_image` has it, which takes nothing from `preprocessor_config.json` but mean and deviation.
fn original_tiles(c: &Section, tower: &InternVit) -> Result<TileLimits, ConfigError> {
    if c.size_opt("force_image_size")?.is_some_and(|side| side != tower.image_size) {
        return Err(c.invalid("force_image_size", "vision_config.image_size: positions are not interpolated"));
    }
    // The class's default is the first version, which orders a tile's tokens otherwise.
    if c.str_opt("ps_version")? != Some("v2") {
        return Err(c.invalid("ps_version", "\"v2\""));
    }
    limits(c, "min_dynamic_patch", c.size_opt("min_dynamic_patch")?.unwrap_or(1), c.size("max_dynamic_patch")?)
}

/// transformers' `InternVLProcessor` always cuts tiles, whatever `crop_to_patches` says.
fn transformers_tiles(p: &Section, tower: &InternVit) -> Result<TileLimits, ConfigError> {
    const CLASS: &str = "GotOcr2ImageProcessor";
    if p.str_opt("image_processor_type")?.is_some_and(|kind| !kind.starts_with(CLASS)) {
        return Err(p.invalid("image_processor_type", CLASS));
    }
    if p.bool_opt("do_center_crop")? == Some(true) {
        return Err(p.invalid("do_center_crop", "false or absent"));
    }
    let size = p.section("size")?;
    if [size.size("height")?, size.size("width")?] != [tower.image_size; 2] {
        return Err(p.invalid("size", "the vision tower's image_size on both sides"));
    }
    let limit = |key: &str, default: usize| Ok(p.size_opt(key)?.unwrap_or(default));
    limits(p, "min_patches", limit("min_patches", 1)?, limit("max_patches", 12)?)
}

/// The runtime takes any number of tiles, but the tower sees each.
fn limits(s: &Section, key: &str, min: usize, max: usize) -> Result<TileLimits, ConfigError> {
    if min > max || max > 1000 {
        return Err(s.invalid(key, "at most the largest number of tiles, which is at most 1000"));
    }
    Ok(TileLimits { min, max })
}
