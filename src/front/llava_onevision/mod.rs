//! LLaVA-OneVision: its keys, the names of its tensors, and what the runtime cannot do.
mod config;

pub use config::{LlavaOnevision, Preprocessing};

use super::assemble::{self, Parts};
use super::config::ConfigError;
use super::decoder::{DecoderArch, HEAD};
use super::tower::TowerArch;
use super::{Pair, Row};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::gguf::Metadata;

/// Both files of a checkpoint. `name` is the hub's or the directory's; `repository` is `org/name` on the hub.
///
/// # Errors
/// A configuration, vocabulary or tensor that is missing, wrong or beyond the runtime.
pub fn open<'a>(checkpoint: &'a Checkpoint, name: &str, repository: Option<&str>) -> Result<Pair<'a>, Error> {
    let model = LlavaOnevision::read(checkpoint)?;
    check_runtime_limits(checkpoint, &model)?;
    let parts = Parts {
        text: &model.text,
        text_keys: &|_| (),
        vision_rows: vision_rows(&model),
        vision_keys: &|keys| model.write_vision(keys),
        harmless: &|name| harmless(&model, name),
        notes: &model.notes,
    };
    assemble::pair(checkpoint, name, repository, parts)
}

/// What transformers can do and llama.cpp's qwen2 cannot.
fn check_runtime_limits(checkpoint: &Checkpoint, m: &LlavaOnevision) -> Result<(), ConfigError> {
    let file = checkpoint.dir().join("config.json");
    if m.text.arch != DecoderArch::Qwen2 {
        return Err(ConfigError::Unsupported {
            file,
            found: "text_config: llama".into(),
            supported: "qwen2 text models in LLaVA-OneVision".into(),
        });
    }
    if m.text.num_heads * m.text.head_dim != m.text.hidden_size {
        return Err(ConfigError::Invalid {
            file,
            key: "text_config.head_dim".into(),
            found: m.text.head_dim.to_string(),
            want: "hidden_size / num_attention_heads, as llama.cpp's qwen2 has it",
        });
    }
    Ok(())
}

/// Tensors that the model's answers do not depend on.
fn harmless(model: &LlavaOnevision, name: &str) -> bool {
    // The same bytes as the embedding: else the head is not tied, and claimed.
    if name == HEAD {
        return model.text.tie_word_embeddings;
    }
    let Some(part) = name.strip_prefix("vision_tower.vision_model.") else { return false };
    // Blocks behind the one whose output the projector reads, and what follows the last block.
    let block = part.strip_prefix("encoder.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    block.is_some_and(|block| block >= model.vision.used_layers)
        || part.starts_with("post_layernorm.")
        || part.starts_with("head.")
        // 0, 1, 2, …
        || part == "embeddings.position_ids"
}

/// The tensors of tower, projector and `image_newline`, of the blocks that run only.
fn vision_rows(m: &LlavaOnevision) -> Vec<Row> {
    let width = m.text.hidden_size;
    let mut rows = m.vision.rows();
    for (name, stored, cols) in [("mm.0", "linear_1", m.vision.hidden_size), ("mm.2", "linear_2", width)] {
        let from = format!("multi_modal_projector.{stored}");
        rows.push(Row::matrix(format!("{name}.weight"), format!("{from}.weight"), &[width, cols]));
        if m.projector_bias {
            rows.push(Row::vector(format!("{name}.bias"), format!("{from}.bias"), &[width]));
        }
    }
    rows.push(Row::vector("v.image_newline", "image_newline", &[width]));
    rows
}

impl LlavaOnevision {
    /// The keys of tower and projector for projector type `llava_onevision`.
    fn write_vision(&self, keys: &mut Metadata) {
        keys.set("clip.has_vision_encoder", true).set("clip.projector_type", "llava_onevision");
        // SigLIP's GELU is the tanh form; false is CLIP's quick GELU.
        keys.set("clip.use_gelu", self.vision.arch == TowerArch::Siglip);
        let v = &self.vision;
        let sizes = [
            ("image_size", v.image_size),
            ("patch_size", v.patch_size),
            ("embedding_length", v.hidden_size),
            ("feed_forward_length", v.intermediate_size),
            ("block_count", v.used_layers),
            ("attention.head_count", v.num_heads),
            ("projection_dim", self.text.hidden_size),
            ("anyres_max", self.anyres_max),
        ];
        for (key, value) in sizes {
            keys.set(&format!("clip.vision.{key}"), value as u32);
        }
        keys.set("clip.vision.attention.layer_norm_epsilon", v.layer_norm_eps as f32);
        keys.set_array("clip.vision.image_mean", self.preprocessing.mean.as_slice());
        keys.set_array("clip.vision.image_std", self.preprocessing.std.as_slice());
        // Pairs of (width, height), in the file's order, which decides between equally good canvases.
        let pinpoints: Vec<i32> =
            self.preprocessing.pinpoints.iter().flat_map(|p| [p.width as i32, p.height as i32]).collect();
        keys.set_array("clip.vision.image_grid_pinpoints", pinpoints.as_slice());
    }
}
