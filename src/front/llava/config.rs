//! `config.json` and the image processor of LLaVA 1.5 and LLaVA-NeXT (1.6), which share everything but the tiles.
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::config_keys;
use crate::front::decoder::DecoderConfig;
use crate::front::processor::{self, Filter, Normalisation, ProcessorFile, Size};
use crate::front::tower::{TowerArch, TowerConfig};
use serde_json::Value;

/// What the tower is shown of a picture.
#[derive(Debug, Clone, PartialEq)]
pub enum View {
    /// LLaVA 1.5: the middle, a square as wide as the picture's shorter side.
    Centre,
    /// LLaVA 1.5 of its own code: all of it, on a square of the mean colour as wide as the longer side.
    Square,
    /// LLaVA-NeXT: an overview, and the tiles of one of these canvases, in the order of the file (ties are broken by it).
    Tiles(Vec<Size>),
}

/// A LLaVA checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Llava {
    pub text: DecoderConfig,
    pub vision: TowerConfig,
    pub view: View,
    pub normalisation: Normalisation,
    pub projector_bias: bool,
    /// What the user should know about how the configuration was read.
    pub notes: Vec<String>,
}

impl Llava {
    /// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file, path: String::new(), json: checkpoint.config() };
        config_keys::check(&c, config_keys::LLAVA)?;
        for (key, want) in [("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "default")] {
            if c.str_opt(key)?.is_some_and(|found| found != want) {
                return Err(c.invalid(key, want).into());
            }
        }
        let feature_layer = match c.get("vision_feature_layer") {
            None => -2,
            Some(v) => v.as_i64().ok_or_else(|| c.invalid("vision_feature_layer", "an integer, one layer"))?,
        };
        let (text, note) = DecoderConfig::of_checkpoint(checkpoint, &c)?;
        let vision = TowerConfig::read(&c.section("vision_config")?, feature_layer)?;
        if vision.arch != TowerArch::Clip {
            return Err(c.section("vision_config")?.invalid("model_type", "clip_vision_model").into());
        }
        let token = c.size_opt("image_token_index")?.or(c.size_opt("image_token_id")?);
        if token.is_some_and(|id| id >= text.vocab_size) {
            return Err(c.invalid("image_token_index", "below text_config.vocab_size").into());
        }
        let projector_bias = c.bool_opt("multimodal_projector_bias")?.unwrap_or(true);
        let tiles = c.str("model_type")? == "llava_next";
        if !tiles && !projector_bias {
            return Err(c.invalid("multimodal_projector_bias", "true: llama.cpp's projector `mlp` has biases").into());
        }
        let (view, normalisation) = read_processor(checkpoint, &c, tiles, vision.image_size)?;
        text.check_blocks(checkpoint, "text_config.num_hidden_layers")?;
        vision.check_blocks(checkpoint)?;
        Ok(Llava { text, vision, view, normalisation, projector_bias, notes: note.into_iter().collect() })
    }
}

/// `side` is the tower's input, pixels.
fn read_processor(
    checkpoint: &Checkpoint,
    config: &Section,
    tiles: bool,
    side: usize,
) -> Result<(View, Normalisation), crate::Error> {
    let processor = ProcessorFile::read(checkpoint)?;
    let p = processor.section();
    let (kinds, want): (&[&str], _) = match tiles {
        true => (&["LlavaNextImageProcessor"], "LlavaNextImageProcessor"),
        false => (&["CLIPImageProcessor", "LlavaImageProcessor"], "CLIPImageProcessor or LlavaImageProcessor"),
    };
    let kind = p.str_opt("image_processor_type")?;
    if kind.is_some_and(|found| !kinds.iter().any(|kind| found.starts_with(kind))) {
        return Err(p.invalid("image_processor_type", want).into());
    }
    let normalisation = read_normalisation(&p, side)?;
    if tiles {
        let of = |s: &Section| Ok(processor::pinpoints(s, side)?.or((side == 336).then(default_pinpoints)));
        let of = |s: &Section| of(s).and_then(|found| found.ok_or_else(|| s.missing("image_grid_pinpoints")));
        let pinpoints = of(&p)?;
        if of(config)? != pinpoints {
            return Err(p.invalid("image_grid_pinpoints", "the same list as in config.json").into());
        }
        return Ok((View::Tiles(pinpoints), normalisation));
    }
    if p.get("size").is_some_and(|size| size.get("height").is_some()) {
        return Err(p.invalid("size", "shortest_edge: stretching pictures to a square is not supported").into());
    }
    if p.bool_opt("do_center_crop")? == Some(false) {
        return Err(p.invalid("do_center_crop", "true").into());
    }
    // Before it resizes: nothing is left to crop. CLIP's has no such key.
    let pads = kind.is_some_and(|kind| kind.starts_with("LlavaImageProcessor")) && p.bool_opt("do_pad")? == Some(true);
    Ok((if pads { View::Square } else { View::Centre }, normalisation))
}

/// What the image processor `p` does to squares, tiles or pictures: it normalises them, and resizes and crops them to `side`,
/// the tower's input, pixels.
///
/// # Errors
/// It does something else.
pub(in crate::front) fn read_normalisation(p: &Section, side: usize) -> Result<Normalisation, ConfigError> {
    let normalisation = Normalisation::read(p, Filter::Bicubic)?;
    if square(p, "crop_size")?.is_some_and(|crop| crop != side) {
        return Err(p.invalid("crop_size", "the vision tower's image_size"));
    }
    if square(p, "size")? != Some(side) {
        return Err(p.invalid("size", "the vision tower's image_size as shortest_edge"));
    }
    Ok(normalisation)
}

/// A size that is a number, a shortest edge, or equal sides.
fn square(p: &Section, key: &str) -> Result<Option<usize>, ConfigError> {
    let Some(value) = p.get(key) else { return Ok(None) };
    let side = |v: Option<&Value>| v.and_then(Value::as_u64);
    let found = match value {
        Value::Object(_) if value.get("shortest_edge").is_some() => side(value.get("shortest_edge")),
        Value::Object(_) => side(value.get("height")).filter(|h| side(value.get("width")) == Some(*h)),
        _ => side(Some(value)),
    };
    let found = found.and_then(|side| usize::try_from(side).ok());
    found.map(Some).ok_or_else(|| p.invalid(key, "a number of pixels, shortest_edge, or equal height and width"))
}

/// transformers' default.
fn default_pinpoints() -> Vec<Size> {
    let sizes = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];
    sizes.map(|(height, width)| Size { height, width }).to_vec()
}
