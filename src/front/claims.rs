//! Every tensor of a checkpoint has its place in the two files, or is known not to be needed.
use super::Row;
use crate::checkpoint::{Checkpoint, CheckpointError};
use std::collections::BTreeSet;

/// Checks each row's presence and shape, and that no tensor is left over but those that are `harmless`: a checkpoint may
/// hold them and the model's answers do not depend on them.
///
/// # Errors
/// One of those is not so; the message names the tensor.
pub(super) fn check<'r>(
    checkpoint: &Checkpoint,
    rows: impl Iterator<Item = &'r Row>,
    harmless: &dyn Fn(&str) -> bool,
) -> Result<(), CheckpointError> {
    let mut claimed = BTreeSet::new();
    for row in rows {
        checkpoint.check(&row.from, &row.stored_shape())?;
        claimed.insert(row.from.as_str());
    }
    // Computed from `rope_theta`; older transformers stored them.
    let computed = |name: &str| name.ends_with(".rotary_emb.inv_freq");
    let mut left = checkpoint.names().filter(|name| !claimed.contains(name) && !computed(name) && !harmless(name));
    let Some(tensor) = left.next().map(|name| checkpoint.stored_name(name)) else { return Ok(()) };
    let more = match left.count() {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    };
    Err(CheckpointError::Unclaimed { path: checkpoint.dir().into(), tensor, more })
}

/// Checks that between `least` and `most` blocks, the range `[least, most]`, are stored under `prefix`: nothing is
/// allocated by a count of config.json before that count is found in the checkpoint.
///
/// # Errors
/// It is not so; the message names the key.
pub(super) fn blocks(
    checkpoint: &Checkpoint,
    key: &'static str,
    claimed: usize,
    prefix: &'static str,
    [least, most]: [usize; 2],
) -> Result<(), CheckpointError> {
    let index = |name: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
    let last = checkpoint.names().filter_map(index).max();
    if last.is_some_and(|last| (least..=most).contains(&last.saturating_add(1))) {
        return Ok(());
    }
    let path = checkpoint.dir().join("config.json");
    let last = last.map_or_else(|| "… none".into(), |last| last.to_string());
    Err(CheckpointError::Blocks { path, key, claimed, prefix, last })
}
