//! What the caches hold for each question: its prompt, the reference's answer, a candidate's measures.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::data::{Question, QuestionForm};
use super::store::CacheKey;
use super::{cache, stats};
use crate::image;
use crate::runtime::engine::{Media, Piece, Token};

/// A prompt without the embeddings of its pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    pub pieces: Vec<PromptPiece>,
    /// Tokens of the given answer, with the end of the turn for a chat.
    pub given: Vec<Token>,
    /// All tokens of the prompt, pictures included.
    pub tokens: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptPiece {
    Text(Vec<Token>),
    /// Place among the picture's parts.
    Media(usize),
}

/// Identity of a question: all that decides its prompt and answer.
pub fn question_key(question: &Question, picture: Option<&CacheKey>) -> CacheKey {
    let form = format!("question {:?} {}", question.form, picture.is_some());
    let mut hash = Sha256::new();
    for part in [form.as_bytes(), question.text.as_bytes(), question.answer.as_bytes(), picture.map_or(&[], |p| &p[..])]
    {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Identity of a picture: its file's `bytes`, and how this version reads them.
pub fn picture_key(bytes: &[u8]) -> CacheKey {
    Sha256::new().chain_update(b"picture").chain_update([image::load::VERSION]).chain_update(bytes).finalize().into()
}

/// The parts of an embedded picture as bytes: number of parts, then for each the layout, the number of tokens and
/// the embedding in f32, every length in front.
pub fn media_to_bytes(parts: &[Arc<Media>]) -> Vec<u8> {
    let mut out = (parts.len() as u64).to_le_bytes().to_vec();
    for part in parts {
        out.extend((part.layout.len() as u64).to_le_bytes());
        out.extend(&part.layout);
        out.extend((part.tokens as u64).to_le_bytes());
        out.extend((part.embedding.len() as u64).to_le_bytes());
        part.embedding.iter().for_each(|v| out.extend(v.to_le_bytes()));
    }
    out
}

/// The reverse; `None` where the bytes are not of that form.
pub fn media_from_bytes(mut bytes: &[u8]) -> Option<Vec<Arc<Media>>> {
    fn number(bytes: &mut &[u8]) -> Option<usize> {
        let (head, rest) = bytes.split_first_chunk::<8>()?;
        *bytes = rest;
        usize::try_from(u64::from_le_bytes(*head)).ok()
    }
    let count = number(&mut bytes)?;
    let mut parts = Vec::new();
    for _ in 0..count {
        let len = number(&mut bytes)?;
        let (layout, rest) = bytes.split_at_checked(len)?;
        bytes = rest;
        let tokens = number(&mut bytes)?;
        let len = number(&mut bytes)?;
        let (values, rest) = bytes.split_at_checked(len.checked_mul(4)?)?;
        bytes = rest;
        let embedding = values.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        parts.push(Arc::new(Media { layout: layout.to_vec(), tokens, embedding }));
    }
    bytes.is_empty().then_some(parts)
}

impl Prompt {
    /// The prompt of tokenised pieces.
    pub fn new(pieces: &[Piece], given: Vec<Token>) -> Self {
        let mut media = 0;
        let mut tokens = 0;
        let pieces = pieces
            .iter()
            .map(|p| match p {
                Piece::Text(t) => {
                    tokens += t.len();
                    PromptPiece::Text(t.clone())
                }
                Piece::Media(m) => {
                    tokens += m.tokens;
                    media += 1;
                    PromptPiece::Media(media - 1)
                }
            })
            .collect();
        Self { pieces, given, tokens }
    }

    /// Puts the picture's parts back; `None` where one is missing.
    pub fn with_media(&self, media: &[Arc<Media>]) -> Option<Vec<Piece>> {
        let piece = |p: &PromptPiece| match p {
            PromptPiece::Text(t) => Some(Piece::Text(t.clone())),
            PromptPiece::Media(i) => media.get(*i).cloned().map(Piece::Media),
        };
        self.pieces.iter().map(piece).collect()
    }
}

/// What the reference makes of a question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// Its own greedy answer, with the token that ended it if one did; empty for a raw prompt.
    pub greedy: Vec<Token>,
    pub text: String,
    /// For each answer (greedy, given) and position: first largest logit, and -log p of the answer's token.
    pub top: [Vec<Token>; 2],
    pub nll: [Vec<f64>; 2],
}

/// A reference's record with its rows of quantised log-probabilities.
pub struct ReferenceRows {
    pub head: Reference,
    rows: Vec<u8>,
    vocab: usize,
}

impl ReferenceRows {
    /// Rows of one answer; where the greedy answer is the given one they are kept once.
    pub fn row(&self, answer: usize, position: usize, out: &mut Vec<f64>) -> Option<()> {
        let skip = if answer == 1 && self.rows_once() { 0 } else { answer * self.head.top[0].len() };
        let size = cache::row_bytes(self.vocab);
        let at = (skip + position) * size;
        cache::decode(self.rows.get(at..at + size)?, self.vocab, out)
    }

    fn rows_once(&self) -> bool {
        self.rows.len() == self.head.top[0].len() * cache::row_bytes(self.vocab) && !self.head.top[0].is_empty()
    }

    pub fn from_bytes(bytes: &[u8], vocab: usize) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk::<8>()?;
        let (head, rows) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        Some(Self { head: serde_json::from_slice(head).ok()?, rows: rows.to_vec(), vocab })
    }
}

/// Collects the rows of a reference while they are computed.
pub struct ReferenceWriter {
    head: Reference,
    rows: [Vec<u8>; 2],
    log_p: Vec<f64>,
}

impl ReferenceWriter {
    pub fn new(greedy: Vec<Token>, text: String) -> Self {
        let head = Reference { greedy, text, top: Default::default(), nll: Default::default() };
        Self { head, rows: Default::default(), log_p: Vec::new() }
    }

    /// Takes the logits that predict `token`, the next one of an answer. False where they are not numbers.
    pub fn row(&mut self, answer: usize, token: Token, logits: &[f32]) -> bool {
        stats::log_softmax(logits, &mut self.log_p);
        self.head.top[answer].push(stats::argmax(logits) as Token);
        let nll = self.log_p.get(token as usize).map_or(f64::NAN, |l| -l);
        self.head.nll[answer].push(nll);
        cache::encode(&self.log_p, &mut self.rows[answer]);
        nll.is_finite()
    }

    /// The record. `same`: the greedy answer is the given one, and only it was run.
    pub fn into_bytes(mut self, same: bool) -> Vec<u8> {
        if same {
            self.head.top[1] = self.head.top[0].clone();
            self.head.nll[1] = self.head.nll[0].clone();
        }
        // invariant: numbers and strings always serialise.
        let head = serde_json::to_vec(&self.head).unwrap_or_default();
        let mut out = (head.len() as u64).to_le_bytes().to_vec();
        out.extend(head);
        out.extend(&self.rows[0]);
        out.extend(&self.rows[1]);
        out
    }
}

/// What a candidate makes of one answer, position by position.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// KL(reference || candidate) in nats.
    pub kl: Vec<f64>,
    /// -log p of the answer's token.
    pub nll: Vec<f64>,
    /// The same of the reference.
    pub nll_reference: Vec<f64>,
    /// Whether both put the same token first.
    pub agree: Vec<bool>,
}

/// What a candidate makes of a question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// On the reference's greedy answer, and on the given one.
    pub measures: [Measures; 2],
    /// Its own greedy answer, and the reference's.
    pub answer: String,
    pub reference: String,
}

/// Exact match of answers without the white space around them; raw prompts have none.
pub fn correct(question: &Question, answer: &str) -> Option<bool> {
    (question.form == QuestionForm::Chat).then(|| answer.trim() == question.answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_survive_as_bytes() {
        let a = Media { layout: vec![1, 2, 3], tokens: 2, embedding: vec![0.5, f32::MIN_POSITIVE, -3.0, 4.0] };
        let b = Media { layout: vec![], tokens: 0, embedding: vec![] };
        let parts = [Arc::new(a), Arc::new(b)];
        let bytes = media_to_bytes(&parts);
        assert_eq!(media_from_bytes(&bytes).unwrap(), parts);
        for len in 0..bytes.len() {
            assert!(media_from_bytes(&bytes[..len]).is_none());
        }
    }

    #[test]
    fn references_survive_as_bytes() {
        for same in [false, true] {
            let mut w = ReferenceWriter::new(vec![1, 2], "x".into());
            assert!(w.row(0, 1, &[0.0, 2.0, 1.0]) && w.row(0, 2, &[0.0, 1.0, 3.0]));
            if !same {
                assert!(w.row(1, 0, &[5.0, 1.0, 3.0]));
            }
            let r = ReferenceRows::from_bytes(&w.into_bytes(same), 3).unwrap();
            assert_eq!(r.head.top, [vec![1, 2], if same { vec![1, 2] } else { vec![0] }]);
            let (mut row, mut exact) = (Vec::new(), Vec::new());
            for (answer, position, logits) in
                [(0, 1, [0.0, 1.0, 3.0]), (1, 0, if same { [0.0, 2.0, 1.0] } else { [5.0, 1.0, 3.0] })]
            {
                r.row(answer, position, &mut row).unwrap();
                stats::log_softmax(&logits, &mut exact);
                assert!(row.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-3));
            }
            assert!(r.row(0, 5, &mut row).is_none());
        }
        let mut w = ReferenceWriter::new(vec![1], "x".into());
        assert!(!w.row(0, 1, &[0.0, f32::NAN]));
    }

    #[test]
    fn keys_depend_on_every_field() {
        let q = |text: &str, answer: &str| Question {
            id: "1".into(),
            image: None,
            form: QuestionForm::Chat,
            text: text.into(),
            answer: answer.into(),
            kind: "k".into(),
        };
        let keys = [
            question_key(&q("a", "bc"), None),
            question_key(&q("ab", "c"), None),
            question_key(&q("a", "bc"), Some(&[0; 32])),
            question_key(&q("a", "bc"), Some(&[1; 32])),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b));
        }
    }
}
