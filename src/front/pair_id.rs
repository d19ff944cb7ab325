//! The id by which a language model and its mmproj are known to belong together.
//!
//! It names what the mmproj was made from, so that all quantisations of one model, and all types of its mmproj, share
//! it. A rotated model's projector writes into a rotated stream: another id.
use super::Source;
use crate::Error;
use crate::digest::hex;
use crate::gguf::Value;
use sha2::{Digest, Sha256};

/// Of tensors of more than `RUNS * RUN` values so many evenly spread runs are hashed: training changes them all, and the
/// conversion takes no longer.
const RUNS: usize = 16;
const RUN: usize = 1024;

/// Keys that count, beside the tensors: sizes, then lists of numbers.
const SIZES: [&str; 5] = ["image_size", "patch_size", "block_count", "attention.head_count", "anyres_max"];
const LISTS: [&str; 2] = ["image_mean", "image_std"];

/// The id of `mmproj`, 32 hexadecimal digits. The type in which the model stores its weights does not matter.
///
/// # Errors
/// A tensor cannot be read or is not finite.
pub(super) fn pair_id(mmproj: &Source) -> Result<String, Error> {
    let key = |name: &str| mmproj.metadata.get(&format!("clip.vision.{name}"));
    let list =
        |name: &str| key(name).and_then(Value::as_array).map(|a| a.iter().collect::<Vec<_>>()).unwrap_or_default();
    let mut hash = Sha256::new().chain_update("mbq.pair 1");
    let sizes = SIZES.iter().filter_map(|name| key(name)?.as_u64());
    let pinpoints: Vec<u64> = list("image_grid_pinpoints").iter().filter_map(Value::as_u64).collect();
    sizes.chain(pinpoints).for_each(|n| hash.update(n.to_le_bytes()));
    let mut values: Vec<f32> =
        LISTS.iter().flat_map(|name| list(name)).filter_map(|v| v.as_f64()).map(|v| v as f32).collect();
    let mut tensors: Vec<_> = mmproj.tensors.iter().map(|t| (mmproj.values.origin(&t.name), t)).collect();
    tensors.sort_by(|a, b| a.0.cmp(b.0));
    for (origin, t) in tensors {
        hash.update(origin);
        let n = t.elements();
        let (runs, run) = if n > RUNS * RUN { (RUNS, RUN) } else { (1, n) };
        for i in 0..runs {
            let start = (n - run) * i / (runs - 1).max(1);
            values.extend(mmproj.values.values(&t.name, start..start + run)?);
            values.drain(..).for_each(|v| hash.update(v.to_le_bytes()));
        }
    }
    Ok(hex(&hash.finalize()[..16]))
}
