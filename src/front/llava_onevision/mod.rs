//! LLaVA-OneVision: its keys, the names of its tensors, and what the runtime cannot do.
mod config;

pub(super) use config::anyres_max;
pub use config::{LlavaOnevision, Preprocessing};

use super::assemble::{self, Parts};
use super::config::ConfigError;
use super::decoder::DecoderArch;
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
    pair(checkpoint, &LlavaOnevision::read(checkpoint)?, (name, repository), None)
}

/// Both files of `model`. `template` is the chat template of a checkpoint that has none.
pub(super) fn pair<'a>(
    checkpoint: &'a Checkpoint,
    model: &LlavaOnevision,
    (name, repository): (&str, Option<&str>),
    template: Option<&str>,
) -> Result<Pair<'a>, Error> {
    check_runtime_limits(checkpoint, model)?;
    let vision_rows = vision_rows(model);
    let leaves_out = |name: &str| model.vision.leaves_out(name);
    let vision_keys = |keys: &mut Metadata| model.write_vision(keys);
    let (text, notes) = (&model.text, model.notes.as_slice());
    assemble::pair(
        checkpoint,
        Parts {
            name,
            repository,
            text,
            vision_rows,
            leaves_out: &leaves_out,
            vision_keys: &vision_keys,
            picture: PictureText::LLAVA,
            template,
            notes,
        },
    )
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

/// The tensors of tower, projector and `image_newline`, of the blocks that run only.
fn vision_rows(m: &LlavaOnevision) -> Vec<Row> {
    let width = m.text.hidden_size;
    let mut rows = [m.vision.rows(), m.vision.projector(width, m.projector_bias)].concat();
    rows.push(Row::vector("v.image_newline", "image_newline", &[width]));
    rows
}

impl LlavaOnevision {
    /// The keys of tower and projector for projector type `llava_onevision`.
    fn write_vision(&self, keys: &mut Metadata) {
        keys.set("clip.has_vision_encoder", true).set("clip.projector_type", "llava_onevision");
        self.vision.write(keys, &[("projection_dim", self.text.hidden_size), ("anyres_max", self.anyres_max)]);
        self.preprocessing.normalisation.write(keys);
        write_pinpoints(&self.preprocessing.pinpoints, keys);
    }
}
