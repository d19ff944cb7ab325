//! Which mmproj belongs to which language model: an id that both files carry.
use super::{GgufError, GgufFile};
use std::path::Path;

/// The metadata key, a string of 32 hexadecimal digits in both files.
pub const PAIR_KEY: &str = "mbq.pair";

/// The id in the file at `path`; none where it has none or cannot be read, which its reader will tell.
pub fn pair_of(path: &Path) -> Option<String> {
    Some(GgufFile::open(path).ok()?.metadata.str(PAIR_KEY)?.to_owned())
}

/// Refuses a vision file that was not made with the language model. Nothing is known of pairs by other programs: a file
/// without an id goes with any.
///
/// # Errors
/// Both have an id, and not the same.
pub fn check_pair(model: (&Path, Option<&str>), mmproj: (&Path, Option<&str>)) -> Result<(), GgufError> {
    match (model.1, mmproj.1) {
        (Some(a), Some(b)) if a != b => Err(GgufError::Pair { model: model.0.into(), mmproj: mmproj.0.into() }),
        _ => Ok(()),
    }
}
