//! Idefics3, SmolVLM and SmolVLM2: SigLIP for tiles of a picture, a projecting layer behind a pixel shuffle, Llama.
mod config;
#[cfg(test)]
mod tests;

pub use config::Idefics3;

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
    let model = Idefics3::read(checkpoint)?;
    let vision_rows = model.vision_rows();
    let leaves_out = |name: &str| model.vision.leaves_out(name);
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes, picture) = (&model.text, model.notes.as_slice(), PictureText::IDEFICS3);
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
    assemble::pair(checkpoint, parts)
}

impl Idefics3 {
    /// The tensors of tower and projector.
    fn vision_rows(&self) -> Vec<Row> {
        let shuffled = self.vision.hidden_size * self.scale_factor.pow(2);
        let shape = [self.text.hidden_size, shuffled];
        let mut rows = self.vision.siglip_rows();
        rows.push(Row::matrix("mm.model.fc.weight", "connector.modality_projection.proj.weight", &shape));
        rows
    }

    /// The keys of tower and projector.
    fn write_vision(&self, keys: &mut Metadata) {
        keys.set("clip.has_vision_encoder", true).set("clip.projector_type", "idefics3");
        let sizes = [
            ("projection_dim", self.text.hidden_size),
            ("projector.scale_factor", self.scale_factor),
            ("preproc_image_size", self.longest_edge),
        ];
        self.vision.write(keys, &sizes);
        self.normalisation.write(keys);
    }
}
