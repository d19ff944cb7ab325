//! Every tensor of the checkpoint has its place in the two files, or is known not to be needed.
use super::LlavaOnevision;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::ggml::GgmlType;
use crate::gguf::FileType;
use crate::gguf::plan::{self, TypeChoice};
use std::collections::BTreeSet;

const DECODER: &str = "language_model.model.layers.";
const TOWER: &str = "vision_tower.vision_model.encoder.layers.";
pub(super) const HEAD: &str = "language_model.lm_head.weight";
pub(super) const EMBEDDING: &str = "language_model.model.embed_tokens.weight";

/// Checks the blocks' number, each tensor's presence and shape, and that none is left over. Nothing is allocated by a
/// count of config.json before that count is found in the checkpoint.
///
/// # Errors
/// One of those is not so; the message names the tensor or the key.
pub(super) fn check(
    checkpoint: &Checkpoint,
    model: &LlavaOnevision,
    projector_bias: bool,
) -> Result<(), CheckpointError> {
    let (text, vision) = (&model.text, &model.vision);
    let decoder = [text.num_layers, text.num_layers];
    blocks(checkpoint, "text_config.num_hidden_layers", text.num_layers, DECODER, decoder)?;
    let tower = [vision.used_layers, vision.num_layers];
    blocks(checkpoint, "vision_config.num_hidden_layers", vision.num_layers, TOWER, tower)?;
    let types = TypeChoice::of(FileType::Plain(GgmlType::F32));
    let mut planned = plan::text(text, &types);
    planned.extend(plan::vision(vision, text.hidden_size, GgmlType::F32, projector_bias));
    for t in &planned {
        checkpoint.check(&t.source, &t.shape)?;
    }
    let claimed: BTreeSet<&str> = planned.iter().map(|t| t.source.as_str()).collect();
    let mut left = checkpoint.names().filter(|name| !claimed.contains(name) && !is_harmless(name, model));
    let Some(tensor) = left.next().map(|name| checkpoint.stored_name(name)) else { return Ok(()) };
    let more = match left.count() {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    };
    Err(CheckpointError::Unclaimed { path: checkpoint.dir().into(), tensor, more })
}

/// Checks that between `least` and `most` blocks, the range `[least, most]`, are stored under `prefix`.
fn blocks(
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

/// Tensors that a checkpoint may hold and the model's answers do not depend on.
fn is_harmless(name: &str, model: &LlavaOnevision) -> bool {
    // Computed from `rope_theta`; older transformers stored them.
    if name.ends_with(".rotary_emb.inv_freq") {
        return true;
    }
    // The same bytes as the embedding: else the head is not tied, and claimed.
    if name == HEAD {
        return model.text.tie_word_embeddings;
    }
    let Some(part) = name.strip_prefix("vision_tower.vision_model.") else { return false };
    // Blocks behind the one whose output the projector reads, and what follows the last block.
    let block = name.strip_prefix(TOWER).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    block.is_some_and(|block| block >= model.vision.used_layers)
        || part.starts_with("post_layernorm.")
        || part.starts_with("head.")
        // 0, 1, 2, …
        || part == "embeddings.position_ids"
}
