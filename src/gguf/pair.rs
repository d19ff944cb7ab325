//! Which mmproj belongs to which language model: an id that both files carry.
use super::{GgufError, GgufFile, Metadata};
use std::path::Path;

/// The metadata key, a string of 32 hexadecimal digits in both files.
pub const PAIR_KEY: &str = "mbq.pair";
/// The metadata key of files whose residual stream is rotated, and how.
pub const ROTATION_KEY: &str = "mbq.rotation";

/// The id in the file at `path`; none where it has none or cannot be read, which its reader will tell.
pub fn pair_of(path: &Path) -> Option<String> {
    Some(GgufFile::open(path).ok()?.metadata.str(PAIR_KEY)?.to_owned())
}

/// Whether a vision file may be the language model's, as far as their metadata say. Nothing is known of files by other
/// programs but that they are not rotated: without an id they go with any that is not.
pub fn belongs(model: &Metadata, mmproj: &Metadata) -> bool {
    match (model.str(PAIR_KEY), mmproj.str(PAIR_KEY)) {
        (Some(a), Some(b)) => a == b,
        _ => model.get(ROTATION_KEY) == mmproj.get(ROTATION_KEY),
    }
}

/// Refuses a vision file that was not made with the language model.
///
/// # Errors
/// They do not belong together.
pub fn check_pair(model: &GgufFile, mmproj: &GgufFile) -> Result<(), GgufError> {
    match belongs(&model.metadata, &mmproj.metadata) {
        true => Ok(()),
        false => Err(GgufError::Pair { model: model.path.clone(), mmproj: mmproj.path.clone() }),
    }
}
