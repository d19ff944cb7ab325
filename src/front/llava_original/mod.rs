//! LLaVA's own layout, as its training code saves models (`liuhaotian/*`, `lmms-lab/*`): the text model's keys are those of
//! config.json itself, and the tower, which `mm_vision_tower` names, is inside or a repository of its own. The models are
//! those of [`super::llava`] and [`super::llava_onevision`].
mod config;
mod tower;

pub(super) use config::{KEY, accept, is_layout};
pub(super) use tower::find_tower;

use super::llava::View;
use super::{Pair, llava, llava_onevision};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::prompt::PictureText;
use config::Original;

/// Both files of a checkpoint whose tower was found. `name` is the hub's or the directory's; `repository` is `org/name`.
///
/// # Errors
/// A configuration, vocabulary or tensor that is missing, wrong or beyond the runtime.
pub fn open<'a>(checkpoint: &'a Checkpoint, name: &str, repository: Option<&str>) -> Result<Pair<'a>, Error> {
    let named = (name, repository);
    match config::read(checkpoint)? {
        (Original::Llava(model), template) => {
            let picture = match model.view {
                View::Tiles(_) => PictureText::LLAVA,
                View::Centre | View::Square => PictureText::LLAVA_ORIGINAL,
            };
            llava::pair(checkpoint, &model, named, picture, template)
        }
        (Original::Onevision(model), template) => llava_onevision::pair(checkpoint, &model, named, template),
    }
}
