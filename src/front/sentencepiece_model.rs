//! `tokenizer.model`, SentencePiece's own file: the protobuf message `ModelProto`, for checkpoints without a
//! `tokenizer.json`. GGUF's vocabulary `llama` is its pieces, scores and types, with the added tokens on top.
//!
//! Of the message only a few fields matter, so that they are walked here instead of by a generated reader.
use super::vocabulary::{Read, Segmentation, Special, Surround, TokenType};
use crate::checkpoint::{Checkpoint, check_names, declared_tokens, optional_json};
use crate::files::read_plain;
use crate::gguf::GgufError;
use std::collections::HashMap;
use std::path::Path;

pub(super) const FILE: &str = "tokenizer.model";

/// llama.cpp's converter gives these to added tokens and to rows without a token.
const ADDED_SCORE: f32 = -1000.0;
const UNUSED_SCORE: f32 = -10000.0;

/// A field's value, by the wire type it has.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Four([u8; 4]),
    Eight,
}

/// Fields of a message one after another: `(number, value)`.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// A base-128 number; None: the message ends inside it, or it has more than 64 bits.
    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            let bits = u64::from(byte & 0x7f);
            value |= bits << shift;
            if bits << shift >> shift != bits {
                return None;
            }
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let tag = self.number()?;
        let value = match tag & 7 {
            0 => Wire::Number(self.number()?),
            1 => self.take(8).map(|_| Wire::Eight)?,
            2 => {
                let n = usize::try_from(self.number()?).ok()?;
                Wire::Bytes(self.take(n)?)
            }
            5 => Wire::Four(*self.take(4)?.first_chunk()?),
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

/// Fields of a message; an error where it is damaged.
impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let left = self.0.len();
        let field = self.field().ok_or_else(|| {
            self.0 = &[];
            format!("no SentencePiece model: a field that does not end, {left} bytes before the end of its message")
        });
        Some(field)
    }
}

/// `ModelProto.SentencePiece`
struct ModelPiece {
    text: String,
    score: f32,
    kind: TokenType,
}

fn piece(bytes: &[u8], id: usize) -> Result<ModelPiece, String> {
    let mut piece = ModelPiece { text: String::new(), score: 0.0, kind: TokenType::Normal };
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(text)) => {
                piece.text = String::from_utf8(text.to_vec()).map_err(|_| format!("piece {id} is no UTF-8"))?;
            }
            (2, Wire::Four(score)) => piece.score = f32::from_le_bytes(score),
            // The numbers are those of GGUF.
            (3, Wire::Number(kind)) => {
                piece.kind = match kind {
                    1 => TokenType::Normal,
                    2 => TokenType::Unknown,
                    3 => TokenType::Control,
                    4 => TokenType::UserDefined,
                    6 => TokenType::Byte,
                    _ => {
                        return Err(format!(
                            "piece {id} has type {kind}; unused pieces and new types are not supported"
                        ));
                    }
                }
            }
            (1..=3, _) => return Err(format!("piece {id} has a field of another type than SentencePiece's")),
            _ => (),
        }
    }
    if piece.text.is_empty() || !piece.score.is_finite() {
        return Err(format!("piece {id} has no text, or a score that is no number"));
    }
    Ok(piece)
}

/// What the file says, with SentencePiece's defaults.
struct SentencePieceModel {
    pieces: Vec<ModelPiece>,
    /// Of `trainer_spec`: 1 unigram, 2 BPE, 3 words, 4 characters.
    kind: u64,
    unk: u64,
    bos: u64,
    eos: u64,
    pad: u64,
    whitespace_as_suffix: bool,
    /// Of `normalizer_spec`: whether there are rules that change text before it is cut.
    normalises: bool,
    space_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
    /// `denormalizer_spec` has rules.
    denormalises: bool,
}

impl SentencePieceModel {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let none = u64::MAX;
        let mut m = SentencePieceModel {
            pieces: Vec::new(),
            kind: 1,
            unk: 0,
            bos: 1,
            eos: 2,
            pad: none,
            whitespace_as_suffix: false,
            normalises: false,
            space_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            denormalises: false,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(bytes)) => m.pieces.push(piece(bytes, m.pieces.len())?),
                (2, Wire::Bytes(bytes)) => {
                    for field in Fields(bytes) {
                        match field? {
                            (3, Wire::Number(kind)) => m.kind = kind,
                            (24, Wire::Number(n)) => m.whitespace_as_suffix = n != 0,
                            // -1, which is `none` as 64 bits: there is no such piece.
                            (40, Wire::Number(id)) => m.unk = id,
                            (41, Wire::Number(id)) => m.bos = id,
                            (42, Wire::Number(id)) => m.eos = id,
                            (43, Wire::Number(id)) => m.pad = id,
                            _ => (),
                        }
                    }
                }
                (3, Wire::Bytes(bytes)) => {
                    for field in Fields(bytes) {
                        match field? {
                            (2, Wire::Bytes(rules)) => m.normalises = !rules.is_empty(),
                            (3, Wire::Number(n)) => m.space_prefix = n != 0,
                            (4, Wire::Number(n)) => m.remove_extra_whitespaces = n != 0,
                            (5, Wire::Number(n)) => m.escape_whitespaces = n != 0,
                            _ => (),
                        }
                    }
                }
                (5, Wire::Bytes(bytes)) => {
                    for field in Fields(bytes) {
                        m.denormalises |= matches!(field?, (2, Wire::Bytes(rules)) if !rules.is_empty());
                    }
                }
                (1..=3 | 5, _) => return Err("no SentencePiece model: a field has another type than it should".into()),
                _ => (),
            }
        }
        m.check().map(|()| m)
    }

    /// Refuses what llama.cpp's `llama` vocabulary has not.
    fn check(&self) -> Result<(), String> {
        if self.pieces.is_empty() {
            return Err("holds no pieces".into());
        }
        match self.kind {
            2 => (),
            1 => return Err("a unigram model; llama.cpp's vocabulary `llama` is SentencePiece's BPE".into()),
            kind => return Err(format!("trainer_spec.model_type is {kind}; only 2, BPE, is supported")),
        }
        if self.whitespace_as_suffix || !self.escape_whitespaces || self.denormalises {
            let problem = "treats whitespace as a suffix, does not escape it, or denormalises what it decodes";
            return Err(format!("{problem}; llama.cpp does none of these"));
        }
        let ids: HashMap<&str, TokenType> = self.pieces.iter().map(|p| (p.text.as_str(), p.kind)).collect();
        if ids.len() != self.pieces.len() {
            return Err("holds a piece twice".into());
        }
        match (0..=255u8).map(|b| format!("<0x{b:02X}>")).find(|b| ids.get(b.as_str()) != Some(&TokenType::Byte)) {
            Some(byte) => Err(format!("has no byte {byte}: models without byte_fallback are not supported")),
            None => Ok(()),
        }
    }

    /// What the user should know: llama.cpp does none of it, nor does transformers' `LlamaTokenizer`.
    fn notes(&self) -> Option<String> {
        let rules = match (self.normalises, self.remove_extra_whitespaces) {
            (false, false) => return None,
            (true, false) => "normalises text",
            (false, true) => "removes extra spaces",
            (true, true) => "normalises text and removes extra spaces",
        };
        Some(format!("{FILE} {rules}; llama.cpp does not, and such text has other tokens there"))
    }
}

/// The tokens of `checkpoint`, padded to `vocab_size`, with what is put before and behind every text.
///
/// # Errors
/// The file is damaged or of a kind that llama.cpp's `llama` is not, or an added token has no place.
pub(super) fn read(checkpoint: &Checkpoint, vocab_size: usize, notes: &mut Vec<String>) -> Result<Read, GgufError> {
    let dir = checkpoint.dir();
    let path = dir.join(FILE);
    let bytes = read_plain(&path).map_err(|source| GgufError::Read { path: path.clone(), source })?;
    let broken = |problem| GgufError::Tokenizer { path: path.clone(), problem };
    let model = SentencePieceModel::parse(&bytes).map_err(broken)?;
    notes.extend(model.notes());
    let config = optional_json(dir, "tokenizer_config.json")?;
    check_names(&dir.join("tokenizer_config.json"), &config)?;
    let space_prefix = config["add_prefix_space"].as_bool().unwrap_or(model.space_prefix);
    let mut table = Table::new(&model, vocab_size).map_err(broken)?;
    for (id, token) in declared_tokens(&config, &optional_json(dir, "added_tokens.json")?) {
        let content = token["content"].as_str().unwrap_or_default();
        table.add(id, content, token["special"].as_bool() == Some(true)).map_err(broken)?;
    }
    let user_defined = table.types.contains(&TokenType::UserDefined);
    if space_prefix && user_defined {
        notes.push(format!("{FILE}: llama.cpp puts a space in front of text behind a user-defined token"));
    }
    let id = |id: u64| u32::try_from(id).ok().filter(|id| (*id as usize) < model.pieces.len());
    let defaults = Special { bos: id(model.bos), eos: id(model.eos), pad: id(model.pad), unk: id(model.unk) };
    let special = Special::read(checkpoint, &table.tokens, vocab_size).or(defaults);
    let adds = |key: &str, default: bool| config[key].as_bool().unwrap_or(default);
    let frame = |adds: bool, id: Option<u32>| id.filter(|_| adds).into_iter().collect();
    Ok(Read {
        frame: Surround {
            before: frame(adds("add_bos_token", true), special.bos),
            behind: frame(adds("add_eos_token", false), special.eos),
        },
        special,
        segmentation: Segmentation::SentencePiece { scores: table.scores, space_prefix },
        tokens: table.tokens,
        types: table.types,
    })
}

/// Whether `dir` has this file and not the one that goes before it.
pub(super) fn is_kind(dir: &Path) -> bool {
    !dir.join("tokenizer.json").exists() && dir.join(FILE).exists()
}

/// Tokens by id.
struct Table {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<TokenType>,
    ids: HashMap<String, usize>,
    /// One behind the last token.
    next: usize,
}

impl Table {
    fn new(model: &SentencePieceModel, vocab_size: usize) -> Result<Self, String> {
        let n = model.pieces.len();
        if n > vocab_size {
            return Err(format!("holds {n} pieces, but the embedding has {vocab_size} rows"));
        }
        let mut table = Table {
            tokens: (0..vocab_size).map(|i| format!("[PAD{i}]")).collect(),
            scores: vec![UNUSED_SCORE; vocab_size],
            types: vec![TokenType::Unused; vocab_size],
            ids: HashMap::new(),
            next: n,
        };
        for (i, piece) in model.pieces.iter().enumerate() {
            table.ids.insert(piece.text.clone(), i);
            (table.scores[i], table.types[i]) = (piece.score, piece.kind);
            table.tokens[i] = spelled(&piece.text, piece.kind);
        }
        Ok(table)
    }

    /// An added token, in place of a piece if it has one's id. Without an id it is the piece of that text, or stands
    /// behind the last token, as transformers counts.
    fn add(&mut self, id: Option<u64>, content: &str, special: bool) -> Result<(), String> {
        let known = self.ids.get(content).copied();
        let id = match id {
            Some(id) => usize::try_from(id).map_err(|_| format!("added token {content:?} has id {id}"))?,
            None => known.unwrap_or(self.next),
        };
        if known.is_some_and(|known| known != id) {
            return Err(format!("{content:?} has id {}, as an added token {id}", known.unwrap_or_default()));
        }
        let rows = self.tokens.len();
        let Some(slot) = self.tokens.get_mut(id) else {
            return Err(format!("added token {content:?} has id {id}, but the embedding has {rows} rows"));
        };
        let kind = if special { TokenType::Control } else { TokenType::UserDefined };
        *slot = spelled(content, kind);
        (self.scores[id], self.types[id]) = (ADDED_SCORE, kind);
        self.ids.insert(content.to_string(), id);
        self.next = self.next.max(id + 1);
        Ok(())
    }
}

/// llama.cpp looks for user-defined tokens in the text as it is written.
fn spelled(text: &str, kind: TokenType) -> String {
    if kind == TokenType::UserDefined { text.replace('▁', " ") } else { text.into() }
}
