//! `vision_config` of Hugging Face's configurations, and the tower's tensors.
use super::config::{ConfigError, Section};
use super::{Row, claims, config_keys};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::gguf::Metadata;

/// Vision towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TowerArch {
    /// No class token, biased patch embedding, tanh-GELU.
    Siglip,
    /// Class token, `pre_layrnorm`, quick-GELU.
    Clip,
}

/// A ViT tower of square pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct TowerConfig {
    pub arch: TowerArch,
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

impl TowerConfig {
    /// Patches on one side of the picture.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Reads `vision_config`; `feature_layer` is the outer `vision_feature_layer`: -1 is the last block's output,
    /// -2 the one before it, k >= 0 the output of k blocks.
    pub(crate) fn read(s: &Section, feature_layer: i64) -> Result<Self, ConfigError> {
        let model_type = s.str("model_type")?;
        let arch = match model_type {
            "siglip_vision_model" => TowerArch::Siglip,
            // SigLIP for pictures of any size, and always given its own.
            "idefics3" | "idefics3_vision" | "smolvlm_vision" => TowerArch::Siglip,
            "clip_vision_model" => TowerArch::Clip,
            other => {
                return Err(ConfigError::Unsupported {
                    file: s.file.clone(),
                    found: format!("{}: {other}", s.key("model_type")),
                    supported: "siglip_vision_model, clip_vision_model, idefics3_vision, smolvlm_vision".into(),
                });
            }
        };
        let (act, want) = match arch {
            TowerArch::Siglip => ("gelu_pytorch_tanh", "gelu_pytorch_tanh (SigLIP)"),
            TowerArch::Clip => ("quick_gelu", "quick_gelu (CLIP)"),
        };
        if s.str_opt("hidden_act")?.is_some_and(|a| a != act) {
            return Err(s.invalid("hidden_act", want));
        }
        config_keys::check(s, config_keys::VISION)?;
        let size = |key: &str| match s.size_opt(key)? {
            Some(size) => Ok(size),
            None => default_size(model_type, key).ok_or_else(|| s.missing(key)),
        };
        let num_layers = size("num_hidden_layers")?;
        let used = if feature_layer < 0 { num_layers as i64 + 1 + feature_layer } else { feature_layer };
        if !(1..=num_layers as i64).contains(&used) {
            return Err(ConfigError::Invalid {
                file: s.file.clone(),
                key: "vision_feature_layer".into(),
                found: feature_layer.to_string(),
                want: "the output of one of the tower's blocks",
            });
        }
        let this = TowerConfig {
            arch,
            hidden_size: size("hidden_size")?,
            intermediate_size: size("intermediate_size")?,
            num_layers,
            used_layers: used as usize,
            num_heads: size("num_attention_heads")?,
            image_size: size("image_size")?,
            patch_size: size("patch_size")?,
            layer_norm_eps: s.float_opt("layer_norm_eps")?.unwrap_or(match arch {
                TowerArch::Siglip => 1e-6,
                TowerArch::Clip => 1e-5,
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

/// Writes the `clip.vision.*` keys that are counts.
pub(crate) fn write_sizes<'k>(keys: &mut Metadata, sizes: impl IntoIterator<Item = &'k (&'k str, usize)>) {
    for (key, value) in sizes {
        keys.set(&format!("clip.vision.{key}"), *value as u32);
    }
}

/// The sizes of transformers' `Idefics3VisionConfig` and `SmolVLMVisionConfig`, which published files leave out.
fn default_size(model_type: &str, key: &str) -> Option<usize> {
    let class = ["idefics3", "idefics3_vision", "smolvlm_vision"].contains(&model_type);
    Some(match key {
        _ if !class => return None,
        "hidden_size" => 1152,
        "intermediate_size" => 3072,
        "num_hidden_layers" => 12,
        "num_attention_heads" => 16,
        "image_size" => 224,
        "patch_size" => 32,
        _ => return None,
    })
}

impl TowerConfig {
    /// # Errors
    /// clip.cpp would take the two linears of a block's MLP for each other, as it does with Gemma 3 and Idefics3.
    pub(crate) fn check_mlp(&self, s: &Section) -> Result<(), ConfigError> {
        if self.intermediate_size == self.hidden_size {
            return Err(s.invalid("intermediate_size", "an MLP of another width than the tower's"));
        }
        Ok(())
    }

    /// Checks that the checkpoint holds as many blocks as run.
    ///
    /// # Errors
    /// It does not; the message names the key.
    pub(crate) fn check_blocks(&self, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
        let range = [self.used_layers, self.num_layers];
        let found = claims::blocks(checkpoint, "vision_config.num_hidden_layers", self.num_layers, BLOCKS, range);
        found.map_err(|error| match (error, checkpoint.tower()) {
            // A tower with a folder of its own has its configuration there.
            (CheckpointError::Blocks { key, claimed, prefix, last, .. }, Some(dir)) => {
                CheckpointError::Blocks { path: dir.join("config.json"), key, claimed, prefix, last }
            }
            (error, _) => error,
        })
    }

    /// The tensors of a SigLIP whose last norm the projector's input has gone through, and which upstream's graph runs: it
    /// takes pixels and the patches' weights in f32.
    pub(crate) fn siglip_rows(&self) -> Vec<Row> {
        let mut rows = self.rows();
        for row in rows.iter_mut().filter(|row| row.tensor.name == "v.patch_embd.weight") {
            *row = row.clone().in_f32();
        }
        rows.extend(Row::norm("v.post_ln", "vision_tower.vision_model.post_layernorm", self.hidden_size, true));
        rows
    }

    /// The tensors of the blocks that run.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let (hidden, inner, patch) = (self.hidden_size, self.intermediate_size, self.patch_size);
        let clip = self.arch == TowerArch::Clip;
        let tower = |part: &str| format!("vision_tower.vision_model.{part}");
        let positions = self.grid() * self.grid() + usize::from(clip);
        let patches = [hidden, 3, patch, patch];
        let position = tower("embeddings.position_embedding.weight");
        let mut rows = vec![
            Row::matrix("v.patch_embd.weight", tower("embeddings.patch_embedding.weight"), &patches),
            Row::vector("v.position_embd.weight", position, &[positions, hidden]),
        ];
        if clip {
            rows.push(Row::vector("v.class_embd", tower("embeddings.class_embedding"), &[hidden]));
            rows.extend(Row::norm("v.pre_ln", &tower("pre_layrnorm"), hidden, true));
        } else {
            rows.push(Row::vector("v.patch_embd.bias", tower("embeddings.patch_embedding.bias"), &[hidden]));
        }
        let linears = [
            ("attn_q", "self_attn.q_proj", [hidden, hidden]),
            ("attn_k", "self_attn.k_proj", [hidden, hidden]),
            ("attn_v", "self_attn.v_proj", [hidden, hidden]),
            ("attn_out", "self_attn.out_proj", [hidden, hidden]),
            ("ffn_up", "mlp.fc1", [inner, hidden]),
            ("ffn_down", "mlp.fc2", [hidden, inner]),
        ];
        for layer in 0..self.used_layers {
            let (to, from) = (format!("v.blk.{layer}"), tower(&format!("encoder.layers.{layer}")));
            for (name, stored) in [("ln1", "layer_norm1"), ("ln2", "layer_norm2")] {
                rows.extend(Row::norm(&format!("{to}.{name}"), &format!("{from}.{stored}"), hidden, true));
            }
            for (name, stored, shape) in linears {
                rows.extend(Row::linear(&format!("{to}.{name}"), &format!("{from}.{stored}"), shape));
            }
        }
        rows
    }
}

impl TowerConfig {
    /// The two layers behind the tower, `width` wide, the text model's.
    pub(crate) fn projector(&self, width: usize, bias: bool) -> Vec<Row> {
        let mut rows = Vec::new();
        for (name, stored, cols) in [("mm.0", "linear_1", self.hidden_size), ("mm.2", "linear_2", width)] {
            let linear = Row::linear(name, &format!("multi_modal_projector.{stored}"), [width, cols]);
            rows.extend(linear.into_iter().take(if bias { 2 } else { 1 }));
        }
        rows
    }

    /// Whether `name` is a tensor of the tower that the projector's input does not depend on.
    pub(crate) fn leaves_out(&self, name: &str) -> bool {
        let Some(part) = name.strip_prefix("vision_tower.vision_model.") else { return false };
        // Blocks behind the one whose output the projector reads, and what follows the last block.
        let block = part.strip_prefix("encoder.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        block.is_some_and(|block| block >= self.used_layers)
            || part.starts_with("post_layernorm.")
            || part.starts_with("head.")
            // 0, 1, 2, …
            || part == "embeddings.position_ids"
    }

    /// The tower's keys.
    pub(crate) fn write(&self, keys: &mut Metadata, more: &[(&str, usize)]) {
        // SigLIP's GELU is the tanh form; false is CLIP's quick GELU.
        keys.set("clip.use_gelu", self.arch == TowerArch::Siglip);
        let sizes = [
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("embedding_length", self.hidden_size),
            ("feed_forward_length", self.intermediate_size),
            ("block_count", self.used_layers),
            ("attention.head_count", self.num_heads),
        ];
        write_sizes(keys, sizes.iter().chain(more));
        keys.set("clip.vision.attention.layer_norm_epsilon", self.layer_norm_eps as f32);
    }
}

/// The tower's blocks, under canonical names.
pub(crate) const BLOCKS: &str = "vision_tower.vision_model.encoder.layers.";
