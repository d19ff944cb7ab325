//! InternVL2, 2.5, 3 and 3.5: InternViT, which sees tiles of a picture, and InternLM2, Llama, Qwen2 or Qwen3, in OpenGVLab's
//! own layout and in transformers'.
mod config;
#[cfg(test)]
mod tests;
mod tower;

pub use config::{InternVl, TileLimits};
pub use tower::{InternVit, Layout, NormKind};

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
    let model = InternVl::read(checkpoint)?;
    let vision_rows = model.tower.rows(model.text.hidden_size);
    // Of training.
    let leaves_out = |name: &str| name == "vision_tower.vision_model.embeddings.mask_token";
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes) = (&model.text, model.notes.as_slice());
    let picture = match model.tower.layout {
        Layout::Original => PictureText::INTERNVL_CHAT,
        Layout::Transformers => PictureText::INTERNVL,
    };
    let parts = Parts {
        name,
        repository,
        text,
        vision_rows,
        leaves_out: &leaves_out,
        vision_keys: &vision_keys,
        picture,
        template: None,
        notes,
    };
    let pair = assemble::pair(checkpoint, parts)?;
    // The runtime writes these two tokens around a picture.
    assemble::check_brackets(checkpoint, &pair, &[(None, "<img>"), (None, "</img>")])?;
    Ok(pair)
}

impl InternVl {
    /// The keys of tower and projector.
    fn write_vision(&self, keys: &mut Metadata) {
        let t = &self.tower;
        keys.set("clip.has_vision_encoder", true).set("clip.projector_type", "internvl").set("clip.use_gelu", true);
        let sizes = [
            ("image_size", t.image_size),
            ("patch_size", t.patch_size),
            ("embedding_length", t.hidden_size),
            ("feed_forward_length", t.intermediate_size),
            ("block_count", t.num_layers),
            ("attention.head_count", t.num_heads),
            ("projection_dim", self.text.hidden_size),
            ("projector.scale_factor", tower::MERGE),
            ("preproc_min_tiles", self.tiles.min),
            ("preproc_max_tiles", self.tiles.max),
        ];
        write_sizes(keys, &sizes);
        keys.set("clip.vision.attention.layer_norm_epsilon", t.norm_eps as f32);
        self.normalisation.write(keys);
        // The model cards of the original repositories resize with Pillow, whose weights are not rounded to 16 bits.
        if t.layout == Layout::Transformers {
            keys.set("clip.vision.torchvision_resize", true);
        }
    }
}
