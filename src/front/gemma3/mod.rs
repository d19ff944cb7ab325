//! Gemma 3 with pictures: SigLIP whose patches are pooled, a norm and a projecting layer, Gemma 3's text model.
mod config;
#[cfg(test)]
mod tests;
mod text;

pub use config::Gemma3;

use super::assemble::{self, Parts};
use super::{Pair, Row};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::gguf::Metadata;
use crate::prompt::PictureText;

/// Both files of a checkpoint. `name` is the hub's or the directory's; `repository` is `org/name` on the hub.
///
/// # Errors
/// A configuration, vocabulary or tensor that is missing, wrong or beyond the runtime.
pub fn open<'a>(checkpoint: &'a Checkpoint, name: &str, repository: Option<&str>) -> Result<Pair<'a>, Error> {
    let model = Gemma3::read(checkpoint)?;
    let vision_rows = model.vision_rows();
    let leaves_out = |name: &str| model.vision.leaves_out(name);
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes, picture) = (&model.text, model.notes.as_slice(), PictureText::GEMMA3);
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
    let brackets = [(Some("boi_token_index"), "<start_of_image>"), (Some("eoi_token_index"), "<end_of_image>")];
    assemble::check_brackets(checkpoint, &pair, &brackets)?;
    Ok(pair)
}

impl Gemma3 {
    /// The tensors of tower and projector.
    fn vision_rows(&self) -> Vec<Row> {
        let (vision, text) = (self.vision.hidden_size, self.text.hidden_size);
        let of = |part: &str| format!("multi_modal_projector.{part}");
        let norm = Row::vector("mm.soft_emb_norm.weight", of("mm_soft_emb_norm.weight"), &[vision]);
        // Stored as it is multiplied with; the runtime transposes it.
        let linear = Row::matrix("mm.input_projection.weight", of("mm_input_projection_weight"), &[vision, text]);
        let mut rows = self.vision.siglip_rows();
        rows.extend([norm.plus_one(), linear]);
        rows
    }

    /// The keys of tower and projector.
    fn write_vision(&self, keys: &mut Metadata) {
        keys.set("clip.has_vision_encoder", true).set("clip.projector_type", "gemma3");
        let sizes = [("projection_dim", self.text.hidden_size), ("projector.scale_factor", self.pooled)];
        self.vision.write(keys, &sizes);
        self.normalisation.write(keys);
    }
}
