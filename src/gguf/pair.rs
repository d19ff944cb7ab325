//! Which mmproj belongs to which language model: an id that both files carry.
//!
//! It names what the mmproj was made from, so that all quantisations of one model, and all types of its mmproj, share
//! it. A rotated checkpoint's projector writes into a rotated stream: another id.
use super::plan::Planned;
use super::{GgufError, GgufFile};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::digest::hex;
use crate::model::llava_onevision::LlavaOnevision;
use sha2::{Digest, Sha256};
use std::path::Path;

/// The metadata key, a string of 32 hexadecimal digits in both files.
pub const PAIR_KEY: &str = "mbq.pair";

/// Of tensors of more than `RUNS * RUN` values so many evenly spread runs are hashed: training changes them all, and the
/// conversion takes no longer.
const RUNS: usize = 16;
const RUN: usize = 1024;

/// The id of the files that `checkpoint` becomes, `plan` being the mmproj's tensors. The type in which the checkpoint
/// stores its weights does not matter.
///
/// # Errors
/// A tensor is missing, misshapen or not finite.
pub fn pair_id(checkpoint: &Checkpoint, model: &LlavaOnevision, plan: &[Planned]) -> Result<String, Error> {
    let (v, p) = (&model.vision, &model.preprocessing);
    let mut hash = Sha256::new().chain_update("mbq.pair 1");
    let mut sizes = vec![v.image_size, v.patch_size, v.used_layers, v.num_heads, model.anyres_max];
    sizes.extend(p.pinpoints.iter().flat_map(|p| [p.width, p.height]));
    sizes.iter().for_each(|&n| hash.update((n as u64).to_le_bytes()));
    let mut values = p.mean.to_vec();
    values.extend(p.std);
    let mut tensors: Vec<&Planned> = plan.iter().collect();
    tensors.sort_by(|a, b| a.source.cmp(&b.source));
    for t in tensors {
        hash.update(&t.source);
        let n = t.elements();
        let (runs, run) = if n > RUNS * RUN { (RUNS, RUN) } else { (1, n) };
        for i in 0..runs {
            let start = (n - run) * i / (runs - 1).max(1);
            values.extend(checkpoint.f32_range(&t.source, &t.shape, start..start + run)?);
            values.drain(..).for_each(|v| hash.update(v.to_le_bytes()));
        }
    }
    Ok(hex(&hash.finalize()[..16]))
}

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
