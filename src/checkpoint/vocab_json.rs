//! `vocab.json` and `merges.txt` as the `tokenizer.json` that transformers makes of them.
use super::{CheckpointError, read_json};
use crate::files::read_plain_text;
use serde_json::{Value, json};
use std::path::Path;

/// The one class of which both files are read; others have rules of their own.
const CLASS: &str = "Qwen2Tokenizer";
/// Of that class.
const REGEX: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer of `dir` without added tokens; none: the two files are not there, or not of Qwen2's class.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn read(dir: &Path) -> Result<Option<Value>, CheckpointError> {
    let merges = dir.join("merges.txt");
    if !dir.join("vocab.json").exists() || !merges.exists() || !dir.join("tokenizer_config.json").exists() {
        return Ok(None);
    }
    let config = read_json(&dir.join("tokenizer_config.json"))?;
    if config["tokenizer_class"].as_str().map(|class| class.trim_end_matches("Fast")) != Some(CLASS) {
        return Ok(None);
    }
    let text = read_plain_text(&merges).map_err(|source| CheckpointError::Io { path: merges, source })?;
    // The first line may name the format's version.
    let lines =
        text.lines().enumerate().filter(|(i, line)| !(line.is_empty() || *i == 0 && line.starts_with("#version")));
    let merges: Vec<&str> = lines.map(|(_, line)| line).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    Ok(Some(json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": false}, bytes]},
        "post_processor": bytes,
        "decoder": bytes,
        "model": {"type": "BPE", "vocab": read_json(&dir.join("vocab.json"))?, "merges": merges}
    })))
}
