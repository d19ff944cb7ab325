//! Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense): one text model behind three towers, which keep a picture's aspect.
mod config;
#[cfg(test)]
mod tests;
mod tower;

pub use config::{PixelLimits, QwenVl};
pub use tower::{Generation, QwenTower};

use super::Pair;
use super::assemble::{self, Parts};
use super::tower::write_sizes;
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::gguf::Metadata;
use crate::prompt::PictureText;

/// Both files of a checkpoint. `name` is the hub's or the directory's; `repository` is `org/name` on the hub.
///
/// # Errors
/// A configuration, vocabulary or tensor that is missing, wrong or beyond the runtime.
pub fn open<'a>(checkpoint: &'a Checkpoint, name: &str, repository: Option<&str>) -> Result<Pair<'a>, Error> {
    let model = QwenVl::read(checkpoint)?;
    let vision_rows = model.tower.rows(model.text.hidden_size);
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes) = (&model.text, model.notes.as_slice());
    let picture = PictureText::QWEN;
    let parts = Parts {
        name,
        repository,
        text,
        vision_rows,
        leaves_out: &|_| false,
        vision_keys: &vision_keys,
        picture,
        template: None,
        notes,
    };
    let pair = assemble::pair(checkpoint, parts)?;
    // The runtime writes these two tokens around a picture, whatever config.json calls them.
    let brackets =
        [(Some("vision_start_token_id"), "<|vision_start|>"), (Some("vision_end_token_id"), "<|vision_end|>")];
    assemble::check_brackets(checkpoint, &pair, &brackets)?;
    Ok(pair)
}

impl QwenVl {
    /// The keys of tower and projector.
    fn write_vision(&self, keys: &mut Metadata) {
        let t = &self.tower;
        keys.set("clip.has_vision_encoder", true).set("clip.projector_type", t.generation.projector());
        let sizes = [
            ("image_size", t.image_size()),
            ("patch_size", t.patch_size),
            ("embedding_length", t.hidden_size),
            ("feed_forward_length", t.intermediate_size),
            ("block_count", t.num_layers),
            ("attention.head_count", t.num_heads),
            ("projection_dim", self.text.hidden_size),
            ("image_min_pixels", self.pixels.min),
            ("image_max_pixels", self.pixels.max),
        ];
        write_sizes(keys, &sizes);
        keys.set("clip.vision.attention.layer_norm_epsilon", tower::EPSILON);
        self.normalisation.write(keys);
        match t.generation {
            // Without a key it is the quick GELU.
            Generation::Two => (),
            Generation::TwoFive => {
                keys.set("clip.use_silu", true);
                keys.set("clip.vision.n_wa_pattern", t.full_attention_every as u32);
            }
            Generation::Three => {
                keys.set("clip.use_gelu", true).set("clip.vision.spatial_merge_size", tower::MERGE as u32);
                let layers: Vec<bool> = (0..t.num_layers).map(|i| t.deepstack.contains(&i)).collect();
                keys.set_array("clip.vision.is_deepstack_layers", layers.as_slice());
            }
        }
    }
}
