//! `config.json` and `preprocessor_config.json` of LLaVA-OneVision.
use crate::checkpoint::Checkpoint;
use crate::image::{anyres::Size, resize::Filter};
use crate::model::config::{ConfigError, Section, TextConfig, VisionConfig};

/// How pictures become pixel values.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessing {
    /// Canvases that tiles are cut from, in the order of the file (ties are broken by it).
    pub pinpoints: Vec<Size>,
    pub mean: [f32; 3],
    pub std: [f32; 3],
    pub filter: Filter,
}

/// A LLaVA-OneVision checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaOnevision {
    pub text: TextConfig,
    pub vision: VisionConfig,
    pub preprocessing: Preprocessing,
    /// The token that stands for a picture in the prompt.
    pub image_token_id: usize,
    /// N of `anyres_max_N`: larger feature grids are shrunk to about N tiles' worth of tokens.
    pub anyres_max: usize,
}

/// Families that [`LlavaOnevision::read`] and its siblings know.
pub(crate) const SUPPORTED: &str = "llava_onevision";

impl LlavaOnevision {
    /// Reads and checks the configuration of `checkpoint`.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file: file.clone(), path: String::new(), json: checkpoint.config() };
        let model_type = c.str("model_type")?;
        if model_type != "llava_onevision" {
            return Err(ConfigError::Unsupported { file, found: model_type.into(), supported: SUPPORTED }.into());
        }
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
        let anyres_max = match c.str_opt("vision_aspect_ratio")?.unwrap_or("anyres_max_9").strip_prefix("anyres_max_") {
            Some(n) => n.parse().map_err(|_| c.invalid("vision_aspect_ratio", "anyres_max_N"))?,
            None => return Err(c.invalid("vision_aspect_ratio", "anyres_max_N").into()),
        };
        let image_token_id = match c.size_opt("image_token_index")? {
            Some(id) => id,
            None => c.size_opt("image_token_id")?.ok_or_else(|| c.missing("image_token_index"))?,
        };
        let section = c.section("text_config")?;
        let mut text = TextConfig::read(&section, c.bool_opt("tie_word_embeddings")?)?;
        // Published 0.5B files tie in the text model only; then no head is stored.
        if !checkpoint.contains("language_model.lm_head.weight")
            && section.bool_opt("tie_word_embeddings")? == Some(true)
        {
            text.tie_word_embeddings = true;
        }
        let vision = VisionConfig::read(&c.section("vision_config")?, feature_layer)?;
        let preprocessing = Preprocessing::read(checkpoint, &c, vision.image_size)?;
        Ok(LlavaOnevision { text, vision, preprocessing, image_token_id, anyres_max })
    }
}

impl Preprocessing {
    fn read(checkpoint: &Checkpoint, config: &Section, side: usize) -> Result<Self, crate::Error> {
        const FILE: &str = "preprocessor_config.json";
        let json = checkpoint.json(FILE)?;
        let p = Section { file: checkpoint.dir().join(FILE), path: String::new(), json: &json };
        let size = p.section("size")?;
        if (size.size("height")?, size.size("width")?) != (side, side) {
            return Err(p.invalid("size", "the vision tower's image_size on both sides").into());
        }
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            if p.bool_opt(key)? == Some(false) {
                return Err(p.invalid(key, "true").into());
            }
        }
        // transformers 5 may leave the pinpoints to config.json alone.
        let pinpoints = match p.get("image_grid_pinpoints") {
            Some(_) => pinpoints(&p, side)?,
            None => pinpoints(config, side)?,
        };
        if config.get("image_grid_pinpoints").is_some() && self::pinpoints(config, side)? != pinpoints {
            return Err(p.invalid("image_grid_pinpoints", "the same list as in config.json").into());
        }
        let rescale = p.float_opt("rescale_factor")?.unwrap_or(1.0 / 255.0);
        if (rescale * 255.0 - 1.0).abs() > 1e-6 {
            return Err(p.invalid("rescale_factor", "1/255").into());
        }
        let filter = match p.get("resample") {
            None => Filter::Bicubic,
            Some(v) => v
                .as_u64()
                .and_then(Filter::from_pil)
                .filter(|f| *f == Filter::Bicubic)
                .ok_or_else(|| p.invalid("resample", "3 (bicubic)"))?,
        };
        Ok(Preprocessing { pinpoints, mean: triple(&p, "image_mean")?, std: triple(&p, "image_std")?, filter })
    }
}

fn pinpoints(s: &Section, side: usize) -> Result<Vec<Size>, ConfigError> {
    const KEY: &str = "image_grid_pinpoints";
    let bad = || s.invalid(KEY, "a list of [height, width], multiples of image_size");
    let list = s.get(KEY).ok_or_else(|| s.missing(KEY))?.as_array().ok_or_else(bad)?;
    let side_of = |v: Option<&serde_json::Value>| {
        v.and_then(|v| v.as_u64()).map(|n| n as usize).filter(|n| *n > 0 && n % side == 0 && *n < 1 << 16)
    };
    let all: Option<Vec<Size>> =
        list.iter().map(|p| Some(Size { height: side_of(p.get(0))?, width: side_of(p.get(1))? })).collect();
    all.filter(|v| !v.is_empty()).ok_or_else(bad)
}

fn triple(s: &Section, key: &str) -> Result<[f32; 3], ConfigError> {
    let list = s.get(key).ok_or_else(|| s.missing(key))?.as_array();
    let values: Option<Vec<f32>> = list.and_then(|l| l.iter().map(|v| v.as_f64().map(|x| x as f32)).collect());
    values.and_then(|v| v.try_into().ok()).ok_or_else(|| s.invalid(key, "three numbers"))
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
        assert_eq!((m.vision.used_layers, m.vision.grid(), m.anyres_max, m.image_token_id), (8, 8, 9, 16368));
        assert_eq!(m.preprocessing.pinpoints[5], Size { height: 224, width: 336 });
        let newline = checkpoint.f32("image_newline", &[768]).unwrap();
        assert!(newline.iter().any(|v| *v != 0.0));
        assert!(checkpoint.f32("image_newline", &[767]).unwrap_err().to_string().contains("image_newline"));
    }
}
