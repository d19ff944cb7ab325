//! `config.json` and `preprocessor_config.json` of LLaVA-OneVision.
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::config_keys;
use crate::front::decoder::DecoderConfig;
use crate::front::processor::{self, Filter, Normalisation, ProcessorFile, Size};
use crate::front::tower::TowerConfig;

/// How pictures become pixel values.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessing {
    /// Canvases that tiles are cut from, in the order of the file (ties are broken by it).
    pub pinpoints: Vec<Size>,
    pub normalisation: Normalisation,
}

/// A LLaVA-OneVision checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaOnevision {
    pub text: DecoderConfig,
    pub vision: TowerConfig,
    pub preprocessing: Preprocessing,
    pub projector_bias: bool,
    /// N of `anyres_max_N`: larger feature grids are shrunk to about N tiles' worth of tokens.
    pub anyres_max: usize,
    /// What the user should know about how the configuration was read.
    pub notes: Vec<String>,
}

impl LlavaOnevision {
    /// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file: file.clone(), path: String::new(), json: checkpoint.config() };
        let model_type = c.str("model_type")?;
        if model_type != "llava_onevision" {
            return Err(ConfigError::Unsupported {
                file,
                found: model_type.into(),
                supported: "llava_onevision".into(),
            }
            .into());
        }
        config_keys::check(&c, config_keys::LLAVA_ONEVISION)?;
        if !matches!(c.str_opt("projector_hidden_act")?, None | Some("gelu")) {
            return Err(c.invalid("projector_hidden_act", "gelu").into());
        }
        if !matches!(c.str_opt("vision_feature_select_strategy")?, None | Some("full")) {
            return Err(c.invalid("vision_feature_select_strategy", "full").into());
        }
        let feature_layer = match c.get("vision_feature_layer") {
            None => -1,
            Some(v) => v.as_i64().ok_or_else(|| c.invalid("vision_feature_layer", "an integer"))?,
        };
        let anyres_max = anyres_max(c.str_opt("vision_aspect_ratio")?.unwrap_or("anyres_max_9"));
        let anyres_max =
            anyres_max.ok_or_else(|| c.invalid("vision_aspect_ratio", "anyres_max_N, N from 1 to 1000"))?;
        if c.size_opt("image_token_index")?.or(c.size_opt("image_token_id")?).is_none() {
            return Err(c.missing("image_token_index").into());
        }
        let (text, note) = DecoderConfig::of_checkpoint(checkpoint, &c)?;
        let vision = TowerConfig::read(&c.section("vision_config")?, feature_layer)?;
        let preprocessing = Preprocessing::read(checkpoint, &c, vision.image_size)?;
        text.check_blocks(checkpoint, "text_config.num_hidden_layers")?;
        vision.check_blocks(checkpoint)?;
        let projector_bias = c.bool_opt("multimodal_projector_bias")?.unwrap_or(true);
        Ok(LlavaOnevision {
            text,
            vision,
            preprocessing,
            projector_bias,
            anyres_max,
            notes: note.into_iter().collect(),
        })
    }
}

/// N of `anyres_max_N`, from 1 to 1000.
pub(in crate::front) fn anyres_max(aspect: &str) -> Option<usize> {
    aspect.strip_prefix("anyres_max_")?.parse().ok().filter(|n| (1..=1000).contains(n))
}

impl Preprocessing {
    fn read(checkpoint: &Checkpoint, config: &Section, side: usize) -> Result<Self, crate::Error> {
        let processor = ProcessorFile::read(checkpoint)?;
        let p = processor.section();
        let kind = p.str_opt("image_processor_type")?;
        if kind.is_some_and(|kind| !kind.starts_with("LlavaOnevisionImageProcessor")) {
            return Err(p.invalid("image_processor_type", "LlavaOnevisionImageProcessor").into());
        }
        if p.bool_opt("do_center_crop")? == Some(true) {
            return Err(p.invalid("do_center_crop", "false or absent").into());
        }
        let size = p.section("size")?;
        if (size.size("height")?, size.size("width")?) != (side, side) {
            return Err(p.invalid("size", "the vision tower's image_size on both sides").into());
        }
        let pinpoints = pinpoints(&p, side)?;
        if self::pinpoints(config, side)? != pinpoints {
            return Err(p.invalid("image_grid_pinpoints", "the same list as in config.json").into());
        }
        Ok(Preprocessing { pinpoints, normalisation: Normalisation::read(&p, Filter::Bicubic)? })
    }
}

/// The canvases; where the key is absent, transformers' default of 6 x 6 up to 2304 pixels.
fn pinpoints(s: &Section, side: usize) -> Result<Vec<Size>, ConfigError> {
    let given = processor::pinpoints(s, side)?;
    let sides = || (1..=6).map(|n| 384 * n);
    let all = || sides().flat_map(|height| sides().map(move |width| Size { height, width })).collect();
    given.or((side == 384).then(all)).ok_or_else(|| s.missing("image_grid_pinpoints"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published-format testbed reads as its own config.json says.
    #[test]
    fn reads_the_testbed() {
        let Some(shared) = std::env::var_os("MBQ_SHARED") else {
            return eprintln!("skipped: MBQ_SHARED is not set");
        };
        let dir = std::path::Path::new(&shared).join("testbed/model");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let m = LlavaOnevision::read(&checkpoint).unwrap();
        assert_eq!((m.text.num_layers, m.text.num_kv_heads, m.text.head_dim, m.text.vocab_size), (12, 4, 64, 16384));
        assert!(m.text.tie_word_embeddings && m.text.qkv_bias);
        assert_eq!((m.vision.used_layers, m.vision.grid(), m.anyres_max), (8, 8, 9));
        assert_eq!(m.preprocessing.pinpoints[5], Size { height: 224, width: 336 });
        let newline = checkpoint.f32("image_newline", &[768]).unwrap();
        assert!(newline.iter().any(|v| *v != 0.0));
        assert!(checkpoint.f32("image_newline", &[767]).unwrap_err().to_string().contains("image_newline"));
    }
}
