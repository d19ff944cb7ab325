//! The parts of `config.json` that every family has: a text model and a vision tower.
use super::config_keys;
use serde_json::Value;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("{file}: key `{key}` is missing")]
    Missing { file: PathBuf, key: String },
    #[error("{file}: key `{key}` is {found}; expected {want}")]
    Invalid { file: PathBuf, key: String, found: String, want: &'static str },
    #[error("{file}: model_type `{found}` is not supported; supported: {supported}")]
    Unsupported { file: PathBuf, found: String, supported: &'static str },
}

/// A JSON object and where it stands, for messages.
pub(crate) struct Section<'a> {
    pub file: PathBuf,
    pub path: String,
    pub json: &'a Value,
}

impl<'a> Section<'a> {
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    pub fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { file: self.file.clone(), key: self.key(key) }
    }

    pub fn invalid(&self, key: &str, want: &'static str) -> ConfigError {
        let found = self.json.get(key).map_or("absent".into(), |v| {
            let text = v.to_string();
            if text.len() > 80 { format!("{}…", text.chars().take(80).collect::<String>()) } else { text }
        });
        ConfigError::Invalid { file: self.file.clone(), key: self.key(key), found, want }
    }

    pub fn section(&self, key: &str) -> Result<Section<'a>, ConfigError> {
        let json = self.get(key).ok_or_else(|| self.missing(key))?;
        if !json.is_object() {
            return Err(self.invalid(key, "an object"));
        }
        Ok(Section { file: self.file.clone(), path: self.key(key), json })
    }

    fn typed<T>(
        &self,
        key: &str,
        want: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.get(key).map(|v| read(v).ok_or_else(|| self.invalid(key, want))).transpose()
    }

    /// A count that may be absent.
    pub fn size_opt(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(key, "a positive integer", |v| v.as_u64().filter(|&n| n > 0 && n < 1 << 32).map(|n| n as usize))
    }

    pub fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.size_opt(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn float_opt(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a finite number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn str_opt(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn str(&self, key: &str) -> Result<&'a str, ConfigError> {
        self.str_opt(key)?.ok_or_else(|| self.missing(key))
    }
}

/// Text models that the decoder block covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextArch {
    /// Biases on q, k, v.
    Qwen2,
    /// No biases.
    Llama,
}

/// A text model: decoder blocks of `x + attn(norm(x))`, `h + mlp(norm(h))` with SwiGLU and rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    pub arch: TextArch,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Rows of the embedding, which may exceed the tokenizer's.
    pub vocab_size: usize,
    /// Context length, tokens.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
}

impl TextConfig {
    /// Reads `text_config`. `tied` is the outer configuration's `tie_word_embeddings`, which published files set
    /// there or in the text model.
    pub(crate) fn read(s: &Section, tied: Option<bool>) -> Result<Self, ConfigError> {
        let arch = match s.str("model_type")? {
            "qwen2" => TextArch::Qwen2,
            "llama" => TextArch::Llama,
            other => {
                return Err(ConfigError::Unsupported {
                    file: s.file.clone(),
                    found: format!("{}: {other}", s.key("model_type")),
                    supported: "qwen2, llama",
                });
            }
        };
        match s.str_opt("hidden_act")? {
            None | Some("silu") => (),
            _ => return Err(s.invalid("hidden_act", "silu")),
        }
        config_keys::check(s, config_keys::TEXT)?;
        let num_layers = s.size("num_hidden_layers")?;
        config_keys::check_windows(s, num_layers)?;
        let hidden_size = s.size("hidden_size")?;
        let num_heads = s.size("num_attention_heads")?;
        let num_kv_heads = s.size_opt("num_key_value_heads")?.unwrap_or(num_heads);
        if num_heads % num_kv_heads != 0 {
            return Err(s.invalid("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let head_dim = match s.size_opt("head_dim")? {
            Some(d) => d,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => return Err(s.invalid("num_attention_heads", "a divisor of hidden_size")),
        };
        if head_dim % 2 != 0 {
            return Err(s.invalid("head_dim", "even, for rotary positions"));
        }
        let llama = arch == TextArch::Llama;
        Ok(TextConfig {
            arch,
            hidden_size,
            intermediate_size: s.size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: s.size("vocab_size")?,
            // The defaults of transformers' Qwen2Config and LlamaConfig, for keys that published files leave out.
            max_position_embeddings: s.size_opt("max_position_embeddings")?.unwrap_or(if llama { 2048 } else { 32768 }),
            rms_norm_eps: s.float_opt("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope_theta(s)?.unwrap_or(10_000.0),
            tie_word_embeddings: tied.or(s.bool_opt("tie_word_embeddings")?).unwrap_or(false),
            qkv_bias: if llama { s.bool_opt("attention_bias")?.unwrap_or(false) } else { true },
        })
    }
}

/// The base of plain rotary positions. transformers 5 keeps it in `rope_parameters`, earlier ones beside the other keys.
///
/// # Errors
/// The positions are scaled, partial, in sections, or differ between blocks.
fn rope_theta(s: &Section) -> Result<Option<f64>, ConfigError> {
    let mut theta = s.float_opt("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        if s.get(key).is_none() {
            continue;
        }
        let rope = s.section(key)?;
        for key in ["rope_type", "type"] {
            if !matches!(rope.str_opt(key)?, None | Some("default")) {
                return Err(rope.invalid(key, "\"default\": scaled rotary positions are not supported yet"));
            }
        }
        if rope.get("mrope_section").is_some() {
            return Err(rope.invalid("mrope_section", "absent: positions in sections are not supported"));
        }
        if rope.float_opt("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(rope.invalid("partial_rotary_factor", "1"));
        }
        let per_block = rope.json.as_object().and_then(|o| o.iter().find(|(_, v)| v.is_object()));
        if let Some((key, _)) = per_block {
            return Err(rope.invalid(key, "one set of rotary parameters for all blocks"));
        }
        theta = rope.float_opt("rope_theta")?.or(theta);
    }
    Ok(theta)
}

/// Vision towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionArch {
    /// No class token, biased patch embedding, tanh-GELU.
    Siglip,
    /// Class token, `pre_layrnorm`, quick-GELU.
    Clip,
}

/// A ViT tower of square pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    pub arch: VisionArch,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    /// Blocks that the checkpoint has.
    pub num_layers: usize,
    /// Blocks whose output the projector reads: all up to `vision_feature_layer`.
    pub used_layers: usize,
    pub num_heads: usize,
    /// Side of the input, pixels.
    pub image_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    pub layer_norm_eps: f64,
}

impl VisionConfig {
    /// Patches on one side of the picture.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Reads `vision_config`; `feature_layer` is the outer `vision_feature_layer`: -1 is the last block's output,
    /// -2 the one before it, k >= 0 the output of k blocks.
    pub(crate) fn read(s: &Section, feature_layer: i64) -> Result<Self, ConfigError> {
        let arch = match s.str("model_type")? {
            "siglip_vision_model" => VisionArch::Siglip,
            "clip_vision_model" => VisionArch::Clip,
            other => {
                return Err(ConfigError::Unsupported {
                    file: s.file.clone(),
                    found: format!("{}: {other}", s.key("model_type")),
                    supported: "siglip_vision_model, clip_vision_model",
                });
            }
        };
        let (act, want) = match arch {
            VisionArch::Siglip => ("gelu_pytorch_tanh", "gelu_pytorch_tanh (SigLIP)"),
            VisionArch::Clip => ("quick_gelu", "quick_gelu (CLIP)"),
        };
        if s.str_opt("hidden_act")?.is_some_and(|a| a != act) {
            return Err(s.invalid("hidden_act", want));
        }
        config_keys::check(s, config_keys::VISION)?;
        let num_layers = s.size("num_hidden_layers")?;
        let used = if feature_layer < 0 { num_layers as i64 + 1 + feature_layer } else { feature_layer };
        if !(1..=num_layers as i64).contains(&used) {
            return Err(ConfigError::Invalid {
                file: s.file.clone(),
                key: "vision_feature_layer".into(),
                found: feature_layer.to_string(),
                want: "the output of one of the tower's blocks",
            });
        }
        let this = VisionConfig {
            arch,
            hidden_size: s.size("hidden_size")?,
            intermediate_size: s.size("intermediate_size")?,
            num_layers,
            used_layers: used as usize,
            num_heads: s.size("num_attention_heads")?,
            image_size: s.size("image_size")?,
            patch_size: s.size("patch_size")?,
            layer_norm_eps: s.float_opt("layer_norm_eps")?.unwrap_or(match arch {
                VisionArch::Siglip => 1e-6,
                VisionArch::Clip => 1e-5,
            }),
        };
        if !this.hidden_size.is_multiple_of(this.num_heads) {
            return Err(s.invalid("num_attention_heads", "a divisor of hidden_size"));
        }
        // 384 / 14 leaves a rest: SigLIP's convolution drops it.
        if this.grid() == 0 {
            return Err(s.invalid("patch_size", "at most image_size"));
        }
        Ok(this)
    }
}
