//! LLaVA 1.5 and LLaVA-NeXT (1.6) as llava-hf has them: CLIP, two projecting layers, Llama (Vicuna) or Mistral.
mod config;

pub(super) use config::read_normalisation;
pub use config::{Llava, View};

use super::assemble::{self, Parts};
use super::processor::write_pinpoints;
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
    let model = Llava::read(checkpoint)?;
    let picture = match model.view {
        View::Centre | View::Square => PictureText::LLAVA_1_5,
        View::Tiles(_) => PictureText::LLAVA,
    };
    pair(checkpoint, &model, (name, repository), picture, None)
}

/// Both files of `model`. `picture` is what chat templates write for one, `template` that of a checkpoint that has none.
pub(super) fn pair<'a>(
    checkpoint: &'a Checkpoint,
    model: &Llava,
    (name, repository): (&str, Option<&str>),
    picture: PictureText,
    template: Option<&str>,
) -> Result<Pair<'a>, Error> {
    let vision_rows = model.vision_rows();
    let leaves_out = |name: &str| model.vision.leaves_out(name);
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes) = (&model.text, model.notes.as_slice());
    let parts = Parts {
        name,
        repository,
        text,
        vision_rows,
        leaves_out: &leaves_out,
        vision_keys: &vision_keys,
        picture,
        template,
        notes,
    };
    assemble::pair(checkpoint, parts)
}

impl Llava {
    /// The tensors of tower and projector, of the blocks that run only.
    fn vision_rows(&self) -> Vec<Row> {
        let width = self.text.hidden_size;
        let mut rows = [self.vision.rows(), self.vision.projector(width, self.projector_bias)].concat();
        if matches!(self.view, View::Tiles(_)) {
            rows.push(Row::vector("v.image_newline", "image_newline", &[width]));
        }
        rows
    }

    /// The keys of tower and projector. `mlp` is upstream's: it pads pictures after it resized them, unless the runtime
    /// knows `center_crop` or `pad_to_square`. Its own way with tiles differs from transformers', so that they are `llava_onevision`'s,
    /// without `anyres_max`: grids are never shrunk, and each of several pictures is cut into tiles.
    fn write_vision(&self, keys: &mut Metadata) {
        keys.set("clip.has_vision_encoder", true);
        self.vision.write(keys, &[("projection_dim", self.text.hidden_size)]);
        self.normalisation.write(keys);
        match &self.view {
            View::Centre | View::Square => {
                keys.set("clip.projector_type", "mlp").set("clip.has_llava_projector", true);
                // Without it the last block is left out.
                keys.set_array("clip.vision.feature_layer", [self.vision.used_layers as i32].as_slice());
                let way = if self.view == View::Centre { "center_crop" } else { "pad_to_square" };
                keys.set(&format!("clip.vision.{way}"), true);
            }
            View::Tiles(pinpoints) => {
                keys.set("clip.projector_type", "llava_onevision");
                write_pinpoints(pinpoints, keys);
            }
        }
    }
}
