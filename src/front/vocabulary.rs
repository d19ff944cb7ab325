//! A vocabulary as GGUF holds it, read from `tokenizer.json` and its neighbours, or from `tokenizer.model`: byte-level
//! BPE, or SentencePiece's.
use super::{pretokenizer, sentencepiece, sentencepiece_model};
use crate::checkpoint::Checkpoint;
use crate::files::read_plain;
use crate::gguf::{Array, GgufError, Metadata};
use crate::prompt::PictureText;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// llama.cpp's `LLAMA_TOKEN_TYPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    Normal = 1,
    /// What stands for text that has no token.
    Unknown = 2,
    /// Special: never made from text unless asked for, not shown.
    Control = 3,
    /// Added, but ordinary text.
    UserDefined = 4,
    /// A row of the embedding that no token has.
    Unused = 5,
    /// `<0x0A>`: one byte of text that has no token.
    Byte = 6,
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Segmentation {
    /// `tokenizer.ggml.model` `gpt2`: llama.cpp's name of the pre-tokenizer; merges as `left right`, best first.
    ByteLevel { pre: &'static str, merges: Vec<String> },
    /// `tokenizer.ggml.model` `llama`: of two neighbours those merge first that make the token of the highest score.
    /// `space_prefix`: every text gets a space in front.
    SentencePiece { scores: Vec<f32>, space_prefix: bool },
}

/// The tokens of a model, index = id.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    pub segmentation: Segmentation,
    /// Text in byte-level spelling, or with `▁` for a space (added tokens: as they are).
    pub tokens: Vec<String>,
    pub types: Vec<TokenType>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    /// The tokenizer puts bos before, eos behind every text.
    pub add_bos: bool,
    pub add_eos: bool,
    pub chat_template: Option<String>,
    /// What the user should know.
    pub notes: Vec<String>,
}

const FILE: &str = "tokenizer.json";

/// `tokenizer.json` as JSON, with its path for messages.
pub(super) struct TokenizerFile {
    pub path: PathBuf,
    pub json: Value,
}

impl TokenizerFile {
    pub fn field(&self, field: &str, problem: impl Into<String>) -> GgufError {
        GgufError::TokenizerField { path: self.path.clone(), field: field.into(), problem: problem.into() }
    }
}

impl Vocabulary {
    /// Reads the tokenizer of `checkpoint` and pads it to `vocab_size`, the rows of the embedding. `picture` is what its
    /// chat template writes for one; `template` is taken where it has none.
    ///
    /// # Errors
    /// Both files are absent; one is broken, is no BPE, has rules that llama.cpp does not, or has more tokens than the
    /// embedding has rows.
    pub fn read(
        checkpoint: &Checkpoint,
        vocab_size: usize,
        picture: PictureText,
        template: Option<&str>,
    ) -> Result<Self, GgufError> {
        let mut notes = Vec::new();
        let Read { segmentation, tokens, types, special, frame } = match sentencepiece_model::is_kind(checkpoint.dir())
        {
            true => sentencepiece_model::read(checkpoint, vocab_size, &mut notes)?,
            false => Read::json(checkpoint, vocab_size, &mut notes)?,
        };
        for (ids, side) in [(&frame.before, "before"), (&frame.behind, "behind")] {
            if ids.len() > 1 {
                notes.push(format!("{FILE} puts {} tokens {side} every text; GGUF can say only one", ids.len()));
            }
        }
        // What the tokenizer adds is what bos and eos mean to the runtime, whatever the other files say.
        let bos = frame.before.first().copied().or(special.bos);
        let eos = frame.behind.first().copied().or(special.eos);
        let template = crate::prompt::gguf::read(checkpoint.dir(), picture, template)?;
        const NONE: &str = "the checkpoint has no chat template, so that `chat` and `serve` cannot ask the files anything: copy \
                            chat_template.jinja from the model's instruction-tuned original";
        notes.extend(template.as_ref().map_or(Some(NONE.into()), |t| t.note.clone()));
        Ok(Vocabulary {
            unk: special.unk.filter(|_| matches!(segmentation, Segmentation::SentencePiece { .. })),
            segmentation,
            tokens,
            types,
            // Without a key llama.cpp takes id 11 for both, an ordinary token here.
            bos: bos.or(special.pad).or(eos),
            eos,
            pad: special.pad,
            add_bos: !frame.before.is_empty(),
            add_eos: !frame.behind.is_empty(),
            chat_template: template.map(|t| t.source),
            notes,
        })
    }

    /// Writes the `tokenizer.*` keys.
    pub fn write(&self, keys: &mut Metadata) {
        let types: Vec<i32> = self.types.iter().map(|t| *t as i32).collect();
        let (model, pre) = match &self.segmentation {
            Segmentation::ByteLevel { pre, .. } => ("gpt2", *pre),
            Segmentation::SentencePiece { .. } => ("llama", "default"),
        };
        keys.set("tokenizer.ggml.model", model).set("tokenizer.ggml.pre", pre);
        keys.set_array("tokenizer.ggml.tokens", Array::strings(&self.tokens));
        keys.set_array("tokenizer.ggml.token_type", types.as_slice());
        match &self.segmentation {
            Segmentation::ByteLevel { merges, .. } => {
                keys.set_array("tokenizer.ggml.merges", Array::strings(merges));
            }
            Segmentation::SentencePiece { scores, space_prefix } => {
                keys.set_array("tokenizer.ggml.scores", scores.as_slice());
                keys.set("tokenizer.ggml.add_space_prefix", *space_prefix);
            }
        }
        let ids = [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)];
        for (key, id) in ids {
            if let Some(id) = id {
                keys.set(&format!("tokenizer.ggml.{key}_token_id"), id);
            }
        }
        keys.set("tokenizer.ggml.add_bos_token", self.add_bos);
        keys.set("tokenizer.ggml.add_eos_token", self.add_eos);
        if let Some(template) = &self.chat_template {
            keys.set("tokenizer.chat_template", template);
        }
    }
}

/// What a tokenizer's own file says.
pub(super) struct Read {
    pub segmentation: Segmentation,
    pub tokens: Vec<String>,
    pub types: Vec<TokenType>,
    pub special: Special,
    pub frame: Surround,
}

impl Read {
    /// `tokenizer.json`.
    fn json(checkpoint: &Checkpoint, vocab_size: usize, notes: &mut Vec<String>) -> Result<Self, GgufError> {
        let path = checkpoint.dir().join(FILE);
        let broken = |problem: String| GgufError::Tokenizer { path: path.clone(), problem };
        let source = TokenizerFile { path: path.clone(), json: crate::checkpoint::tokenizer(checkpoint.dir())? };
        let added = added_tokens(&source)?;
        let (vocab, merges) = bpe(&source)?;
        let pieces = match sentencepiece::is_kind(&source) {
            true => Some(sentencepiece::read(&source, &vocab, &merges, &added, notes)?),
            false => None,
        };
        let (tokens, types) = table(&source, &vocab, &added, pieces.as_ref(), vocab_size)?;
        let segmentation = match pieces {
            Some(pieces) => pieces.segmentation(&tokens, &types),
            None => byte_level(&source, merges)?,
        };
        frames(&source)?;
        let tokenizer = Tokenizer::from_bytes(source.json.to_string()).map_err(|e| broken(e.to_string()))?;
        for t in &added {
            // The library numbers added tokens on from the vocabulary, whatever the file says, and so does transformers.
            if let Some(id) = tokenizer.token_to_id(&t.content).filter(|id| *id as usize != t.id) {
                let problem =
                    format!("{:?} has id {}, but tokenizers counts it as {id}; save it again", t.content, t.id);
                return Err(source.field("added_tokens", problem));
            }
        }
        let special = Special::read(checkpoint, &tokens, vocab_size);
        Ok(Read { segmentation, special, frame: Surround::of(&tokenizer).map_err(broken)?, tokens, types })
    }
}

/// What the BPE model has: token -> id, and its merges.
type Bpe = (HashMap<String, usize>, Vec<[String; 2]>);

fn bpe(s: &TokenizerFile) -> Result<Bpe, GgufError> {
    let model = s.json.get("model").filter(|m| m.is_object()).ok_or_else(|| s.field("model", "missing"))?;
    let kind = model.get("type").and_then(Value::as_str).unwrap_or("absent");
    if kind != "BPE" {
        return Err(s.field("model.type", format!("{kind}; only BPE is supported, byte-level or SentencePiece's")));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(key).and_then(Value::as_str).is_some_and(|v| !v.is_empty()) {
            return Err(s.field(&format!("model.{key}"), "set; llama.cpp's BPE has none"));
        }
    }
    let vocab = model.get("vocab").and_then(Value::as_object).ok_or_else(|| s.field("model.vocab", "missing"))?;
    let vocab: Option<_> = vocab.iter().map(|(t, id)| Some((t.clone(), usize::try_from(id.as_u64()?).ok()?))).collect();
    let vocab: HashMap<String, usize> = vocab.ok_or_else(|| s.field("model.vocab", "holds an id that is no number"))?;
    let merges = model.get("merges").and_then(Value::as_array).ok_or_else(|| s.field("model.merges", "missing"))?;
    let merges: Result<Vec<[String; 2]>, GgufError> = merges
        .iter()
        .enumerate()
        .map(|(i, merge)| {
            let bad = || s.field(&format!("model.merges[{i}]"), "not two tokens");
            // Old files: "left right"; new ones: ["left", "right"].
            let (left, right) = match merge {
                Value::String(pair) => pair.split_once(' ').ok_or_else(bad)?,
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(left), Value::String(right)] => (left.as_str(), right.as_str()),
                    _ => return Err(bad()),
                },
                _ => return Err(bad()),
            };
            // Tokens spell a space `Ġ` or `▁`; GGUF separates by a space.
            if left.is_empty() || right.is_empty() || left.contains(' ') || right.contains(' ') {
                return Err(bad());
            }
            Ok([left.into(), right.into()])
        })
        .collect();
    Ok((vocab, merges?))
}

/// Pre-tokenizer and merges of byte-level BPE.
fn byte_level(s: &TokenizerFile, merges: Vec<[String; 2]>) -> Result<Segmentation, GgufError> {
    let flag = |key: &str| s.json["model"][key].as_bool() == Some(true);
    if flag("fuse_unk") {
        return Err(s.field("model.fuse_unk", "true, without byte_fallback; byte-level BPE has no unknown text"));
    }
    normalizer(s)?;
    let rules = s.json.get("pre_tokenizer").unwrap_or(&Value::Null);
    let pre = pretokenizer::detect(rules, flag("ignore_merges")).map_err(|p| s.field("pre_tokenizer", p))?;
    Ok(Segmentation::ByteLevel { pre, merges: merges.into_iter().map(|pair| pair.join(" ")).collect() })
}

/// llama.cpp normalises nothing for byte-level BPE. Published Qwen2 files ask for NFC, which changes only text that
/// is not composed already; like every GGUF of these models, ours leaves it out.
fn normalizer(s: &TokenizerFile) -> Result<(), GgufError> {
    let is_nfc = |n: &Value| n.get("type").and_then(Value::as_str) == Some("NFC");
    match s.json.get("normalizer") {
        None | Some(Value::Null) => Ok(()),
        Some(n) if is_nfc(n) => Ok(()),
        Some(n) if n.get("normalizers").and_then(Value::as_array).is_some_and(|l| l.iter().all(is_nfc)) => Ok(()),
        Some(n) => {
            let kind = n.get("type").and_then(Value::as_str).unwrap_or("?");
            Err(s.field("normalizer", format!("{kind}; llama.cpp normalises no byte-level BPE text")))
        }
    }
}

pub(super) struct Added {
    pub id: usize,
    pub content: String,
    pub special: bool,
}

fn added_tokens(s: &TokenizerFile) -> Result<Vec<Added>, GgufError> {
    let Some(list) = s.json.get("added_tokens").filter(|v| !v.is_null()) else { return Ok(Vec::new()) };
    let list = list.as_array().ok_or_else(|| s.field("added_tokens", "not a list"))?;
    list.iter()
        .enumerate()
        .map(|(i, t)| {
            let content = t.get("content").and_then(Value::as_str);
            let id = t.get("id").and_then(Value::as_u64).and_then(|id| usize::try_from(id).ok());
            let (Some(content), Some(id)) = (content, id) else {
                return Err(s.field(&format!("added_tokens[{i}]"), "has no content or no id"));
            };
            let flag = |key: &str| t.get(key).and_then(Value::as_bool).unwrap_or(false);
            if let Some(key) = ["lstrip", "rstrip", "single_word"].into_iter().find(|key| flag(key)) {
                let problem =
                    format!("true for {content:?}; llama.cpp takes no spaces or words around a token into account");
                return Err(s.field(&format!("added_tokens[{i}].{key}"), problem));
            }
            let special = flag("special");
            Ok(Added { id, content: content.to_string(), special })
        })
        .collect()
}

/// Tokens by id, padded to `vocab_size` with unused ones.
fn table(
    s: &TokenizerFile,
    vocab: &HashMap<String, usize>,
    added: &[Added],
    pieces: Option<&sentencepiece::Pieces>,
    vocab_size: usize,
) -> Result<(Vec<String>, Vec<TokenType>), GgufError> {
    let mut tokens: Vec<Option<(String, TokenType)>> = vec![None; vocab_size];
    let too_many = |field: &str, token: &str, id: usize| {
        s.field(field, format!("token {token:?} has id {id}, but the embedding has {vocab_size} rows"))
    };
    for (token, &id) in vocab {
        let slot = tokens.get_mut(id).ok_or_else(|| too_many("model.vocab", token, id))?;
        if let Some((other, _)) = slot {
            return Err(s.field("model.vocab", format!("{token:?} and {other:?} both have id {id}")));
        }
        let kind = pieces.map_or(TokenType::Normal, |pieces| pieces.token_type(token));
        *slot = Some((token.clone(), kind));
    }
    for t in added {
        let kind = if t.special { TokenType::Control } else { TokenType::UserDefined };
        let slot = tokens.get_mut(t.id).ok_or_else(|| too_many("added_tokens", &t.content, t.id))?;
        if let Some((other, _)) = slot
            && *other != t.content
        {
            return Err(s.field("added_tokens", format!("{:?} and {other:?} both have id {}", t.content, t.id)));
        }
        // llama.cpp looks for user-defined tokens in the text as it is written.
        let spaced = pieces.is_some() && !t.special;
        *slot = Some((if spaced { t.content.replace('▁', " ") } else { t.content.clone() }, kind));
    }
    Ok(tokens.into_iter().enumerate().map(|(i, t)| t.unwrap_or((format!("[PAD{i}]"), TokenType::Unused))).unzip())
}

/// The library panics where a template of the post-processor names a token that it does not define.
fn frames(s: &TokenizerFile) -> Result<(), GgufError> {
    let processor = &s.json["post_processor"];
    for p in std::iter::once(processor).chain(processor["processors"].as_array().into_iter().flatten()) {
        let parts = ["single", "pair"].iter().flat_map(|side| p[*side].as_array().into_iter().flatten());
        let mut names = parts.filter_map(|part| part["SpecialToken"]["id"].as_str());
        if let Some(name) = names.find(|name| p["special_tokens"].get(name).is_none()) {
            return Err(
                s.field("post_processor", format!("{name:?} stands in a template, but not in its special_tokens"))
            );
        }
    }
    Ok(())
}

/// The ids that the tokenizer puts before and behind a text.
pub(super) struct Surround {
    pub before: Vec<u32>,
    pub behind: Vec<u32>,
}

impl Surround {
    fn of(tokenizer: &Tokenizer) -> Result<Self, String> {
        let encode =
            |special| tokenizer.encode_fast("a", special).map(|e| e.get_ids().to_vec()).map_err(|e| e.to_string());
        let (bare, full) = (encode(false)?, encode(true)?);
        let at = full.windows(bare.len().max(1)).position(|w| w == bare);
        let at = at.ok_or("its post_processor changes the text's own tokens")?;
        Ok(Surround { before: full[..at].to_vec(), behind: full[at + bare.len()..].to_vec() })
    }
}

/// Ids of the special tokens, by name from the tokenizer's files, else by id from the model's.
pub(super) struct Special {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    pub unk: Option<u32>,
}

impl Special {
    pub fn read(checkpoint: &Checkpoint, tokens: &[String], vocab_size: usize) -> Self {
        let ids: HashMap<&str, u32> = tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i as u32)).collect();
        let optional = |file: &str| readable_json(checkpoint.dir(), file);
        let named = [optional("tokenizer_config.json"), optional("special_tokens_map.json")];
        let config = checkpoint.config();
        let text = config.get("text_config").cloned().unwrap_or(Value::Null);
        let numbered = [optional("generation_config.json"), text, config.clone()];
        let find = |role: &str| {
            let by_name = named.iter().find_map(|file| {
                let token = file.get(format!("{role}_token"))?;
                ids.get(token.as_str().or_else(|| token.get("content")?.as_str())?).copied()
            });
            by_name.or_else(|| {
                numbered.iter().find_map(|file| {
                    let id = file.get(format!("{role}_token_id"))?;
                    // Several ids: the first is the one that ends an answer.
                    let id = id.as_u64().or_else(|| id.get(0)?.as_u64())?;
                    u32::try_from(id).ok().filter(|id| (*id as usize) < vocab_size)
                })
            })
        };
        Special { bos: find("bos"), eos: find("eos"), pad: find("pad"), unk: find("unk") }
    }

    /// `other` where nothing is known.
    pub fn or(self, other: Special) -> Self {
        Special {
            bos: self.bos.or(other.bos),
            eos: self.eos.or(other.eos),
            pad: self.pad.or(other.pad),
            unk: self.unk.or(other.unk),
        }
    }
}

/// A JSON file that need not be there; one that cannot be read counts as absent, for each is only one of several
/// places that hold the same.
fn readable_json(dir: &Path, file: &str) -> Value {
    read_plain(&dir.join(file)).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or(Value::Null)
}
