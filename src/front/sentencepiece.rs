//! SentencePiece's BPE in a `tokenizer.json`: byte fallback, `▁` for a space. llama.cpp cuts such text by the scores of
//! the tokens, `tokenizer.json` by a list of merges; this is where the scores come from, and where the two would differ.
use super::vocabulary::{Added, Segmentation, TokenType, TokenizerFile};
use crate::gguf::GgufError;
use serde_json::Value;
use std::collections::{HashMap, HashSet};

/// What GGUF needs beside the tokens.
pub(super) struct Pieces {
    /// Rank of the tokens that merges make, best first; added tokens have none.
    ranks: HashMap<String, usize>,
    unk: Option<String>,
    space_prefix: bool,
}

/// Scores that llama.cpp's converter gives to added tokens and to rows without a token; no merge makes either.
const ADDED_SCORE: f32 = -1000.0;
const UNUSED_SCORE: f32 = -10000.0;

/// Whether `tokenizer.json` is of this kind.
pub(super) fn is_kind(s: &TokenizerFile) -> bool {
    s.json["model"]["byte_fallback"].as_bool() == Some(true)
}

/// Reads the rules and turns the order of `merges` into ranks.
///
/// # Errors
/// A byte has no token; the text is prepared in a way that llama.cpp does not know; the merges do not follow from an
/// order of the tokens.
pub(super) fn read(
    s: &TokenizerFile,
    vocab: &HashMap<String, usize>,
    merges: &[[String; 2]],
    added: &[Added],
    notes: &mut Vec<String>,
) -> Result<Pieces, GgufError> {
    if let Some(byte) = (0..=255u8).map(|b| format!("<0x{b:02X}>")).find(|byte| !vocab.contains_key(byte)) {
        return Err(s.field("model.vocab", format!("has no {byte}, which byte_fallback needs")));
    }
    for key in ["ignore_merges", "dropout"] {
        let value = &s.json["model"][key];
        if !matches!(value, Value::Null | Value::Bool(false)) && value.as_f64() != Some(0.0) {
            return Err(s.field(&format!("model.{key}"), format!("{value}; llama.cpp merges what it can, always")));
        }
    }
    let space_prefix = space_prefix(s, notes)?;
    let ranks = ranks(s, vocab, merges, added)?;
    let unk = s.json["model"]["unk_token"].as_str().map(String::from);
    Ok(Pieces { ranks, unk, space_prefix })
}

/// Ranks of the tokens that merges make: all merges that make one token stand together, and every pair of neighbours
/// that makes a token is one of them, for llama.cpp merges whatever makes a token.
fn ranks(
    s: &TokenizerFile,
    vocab: &HashMap<String, usize>,
    merges: &[[String; 2]],
    added: &[Added],
) -> Result<HashMap<String, usize>, GgufError> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut pairs: HashSet<(&str, &str)> = HashSet::new();
    let mut last = String::new();
    let added: HashSet<&str> = added.iter().map(|t| t.content.as_str()).collect();
    for (i, [left, right]) in merges.iter().enumerate() {
        let made = format!("{left}{right}");
        let field = || format!("model.merges[{i}]");
        if added.contains(made.as_str()) {
            // Cut out of the text before any merge, but for Gemma's runs of `▁`: llama.cpp cuts those out too.
            if made.contains('▁') && !ranks.is_empty() {
                let problem = "an added token, behind merges of others; llama.cpp looks for it first";
                return Err(s.field(&field(), format!("makes {made:?}, {problem}")));
            }
            continue;
        }
        if !vocab.contains_key(&made) {
            return Err(s.field(&field(), format!("makes {made:?}, which is no token")));
        }
        if made != last {
            let rank = ranks.len();
            if ranks.insert(made.clone(), rank).is_some() {
                let problem = "which an earlier merge makes before another token; SentencePiece has one score for each";
                return Err(s.field(&field(), format!("makes {made:?}, {problem}")));
            }
        }
        pairs.insert((left, right));
        last = made;
    }
    let symbol = |text: &str| vocab.contains_key(text) || text.chars().nth(1).is_none();
    for token in vocab.keys().filter(|token| !added.contains(token.as_str()) && !is_byte(token)) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if symbol(left) && symbol(right) && !pairs.contains(&(left, right)) {
                let problem =
                    format!("do not have {left:?} + {right:?}, but {token:?} is a token: no SentencePiece model");
                return Err(s.field("model.merges", problem));
            }
        }
    }
    Ok(ranks)
}

/// Whether every text gets a space in front: `▁` is all that may be done to a text.
fn space_prefix(s: &TokenizerFile, notes: &mut Vec<String>) -> Result<bool, GgufError> {
    let rules = |key: &str, list: &str| match s.json.get(key) {
        None | Some(Value::Null) => Vec::new(),
        Some(rule) => rule.get(list).and_then(Value::as_array).cloned().unwrap_or_else(|| vec![rule.clone()]),
    };
    let (mut prefix, mut spaces) = (false, false);
    for rule in rules("normalizer", "normalizers") {
        match rule["type"].as_str() {
            Some("Prepend") if rule["prepend"] == "▁" && !spaces => prefix = true,
            Some("Replace") if rule["pattern"]["String"] == " " && rule["content"] == "▁" => spaces = true,
            _ => return Err(s.field("normalizer", format!("{rule}; llama.cpp writes `▁` for a space, nothing else"))),
        }
    }
    for rule in rules("pre_tokenizer", "pretokenizers") {
        // Gemma's: no space is left at which it could cut.
        if spaces && rule["type"] == "Split" && rule["pattern"]["String"] == " " {
            continue;
        }
        let split = rule["split"].as_bool().unwrap_or(true);
        let ours = rule["type"] == "Metaspace" && rule["replacement"] == "▁" && !split && !prefix && !spaces;
        match rule["prepend_scheme"].as_str().filter(|_| ours) {
            Some("never") => (),
            Some(scheme @ ("always" | "first")) => {
                prefix = true;
                let at = if scheme == "first" { "behind a special token, or " } else { "" };
                notes.push(format!(
                    "{}: llama.cpp puts a space in front of text {at}that begins with a space, transformers does not",
                    s.path.display()
                ));
            }
            _ => return Err(s.field("pre_tokenizer", format!("{rule}; llama.cpp cuts no SentencePiece text"))),
        }
        spaces = true;
    }
    if !spaces {
        return Err(s.field("normalizer", "absent; a SentencePiece vocabulary spells a space `▁`"));
    }
    Ok(prefix)
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

impl Pieces {
    /// The type of a token of the vocabulary.
    pub fn token_type(&self, token: &str) -> TokenType {
        match token {
            byte if is_byte(byte) => TokenType::Byte,
            unk if self.unk.as_deref() == Some(unk) => TokenType::Unknown,
            _ => TokenType::Normal,
        }
    }

    /// Scores of all `tokens`: minus the rank. Where no merge makes a token, nothing depends on its score.
    pub fn segmentation(&self, tokens: &[String], types: &[TokenType]) -> Segmentation {
        let score = |(token, kind): (&String, &TokenType)| match kind {
            TokenType::Unused => UNUSED_SCORE,
            TokenType::Control | TokenType::UserDefined => ADDED_SCORE,
            TokenType::Byte | TokenType::Unknown => 0.0,
            TokenType::Normal => -(self.ranks.get(token).copied().unwrap_or(self.ranks.len()) as f32),
        };
        let scores = tokens.iter().zip(types).map(score).collect();
        Segmentation::SentencePiece { scores, space_prefix: self.space_prefix }
    }
}
