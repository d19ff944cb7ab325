//! InternVL2, 2.5, 3 and 3.5: InternViT, which sees tiles of a picture, and InternLM2, Llama, Qwen2 or Qwen3, in OpenGVLab's
//! own layout and in transformers'.
mod config;
#[cfg(test)]
mod tests;
mod tower;

pub use config::{InternVl, TileLimits};
pub use tower::{InternVit, Layout, NormKind};

use super::assemble::{self, Parts};
use super::decoder::HEAD;
use super::{FrontError, Pair, claims};
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
    let (text_rows, vision_rows) = (model.text.rows(), model.tower.rows(model.text.hidden_size));
    let harmless = |name: &str| match name {
        // The same bytes as the embedding: else the head is not tied, and claimed.
        HEAD => model.text.tie_word_embeddings,
        // Of training.
        _ => name == "vision_tower.vision_model.embeddings.mask_token",
    };
    claims::check(checkpoint, text_rows.iter().chain(&vision_rows), &harmless)?;
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes) = (&model.text, model.notes.as_slice());
    let picture = match model.tower.layout {
        Layout::Original => PictureText::INTERNVL_CHAT,
        Layout::Transformers => PictureText::INTERNVL,
    };
    let parts = Parts { name, repository, text, text_rows, vision_rows, vision_keys: &vision_keys, picture, notes };
    let pair = assemble::pair(checkpoint, parts)?;
    check_brackets(checkpoint, &pair)?;
    Ok(pair)
}

/// The runtime writes these two tokens around a picture.
fn check_brackets(checkpoint: &Checkpoint, pair: &Pair) -> Result<(), FrontError> {
    let tokens = pair.text.metadata.get("tokenizer.ggml.tokens").and_then(|v| v.as_array());
    let has = |token: &str| tokens.is_some_and(|t| t.iter().any(|t| t.as_str() == Some(token)));
    match ["<img>", "</img>"].into_iter().find(|token| !has(token)) {
        None => Ok(()),
        Some(token) => {
            let problem = format!("no token {token:?}, which stands beside every picture");
            Err(FrontError::File { file: checkpoint.dir().join("tokenizer.json"), problem })
        }
    }
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
        for (key, value) in sizes {
            keys.set(&format!("clip.vision.{key}"), value as u32);
        }
        keys.set("clip.vision.attention.layer_norm_epsilon", t.norm_eps as f32);
        self.normalisation.write(keys);
        // The model cards of the original repositories resize with Pillow, whose weights are not rounded to 16 bits.
        if t.layout == Layout::Transformers {
            keys.set("clip.vision.torchvision_resize", true);
        }
    }
}
