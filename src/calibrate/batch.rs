//! The calibration batch: samples packed into chunks, with the masks that the loss needs.
use super::CalibrateError;
use crate::model::decoder::Span;
use candle_core::{Device, Result, Tensor};

/// What a token is to the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Prompt or padding: in the statistics of activations, not in the loss.
    Other,
    /// A vision embedding (the newline embedding included).
    Vision,
    /// A token of the answer or the end-of-turn token after it.
    Answer,
}

/// One picture with its question and answer, embedded.
#[derive(Debug, Clone)]
pub struct Sample {
    /// `[tokens, hidden]`, f32, on the CPU.
    pub embeds: Tensor,
    pub kinds: Vec<Kind>,
    /// Token ids; only those of answer tokens are read.
    pub ids: Vec<u32>,
    /// Tokens that are not padding (all of them, but for a batch padded as the authors' code pads).
    pub real: usize,
}

/// Samples packed in one matrix.
#[derive(Debug, Clone)]
pub struct Chunk {
    pub spans: Vec<Span>,
    pub kinds: Vec<Kind>,
    pub ids: Vec<u32>,
}

impl Chunk {
    pub fn tokens(&self) -> usize {
        self.kinds.len()
    }
}

/// Everything that the search and the sensitivities need to know about the data, but for the activations.
#[derive(Debug, Clone)]
pub struct Batch {
    pub chunks: Vec<Chunk>,
    pub samples: usize,
    pub vision: usize,
    pub answer: usize,
    pub tokens: usize,
    pub longest: usize,
}

/// Packs `samples` in order into chunks of at least `chunk_tokens` tokens; returns the chunks' embeddings too.
///
/// # Errors
/// No samples; a sample without an answer token (its loss would be NaN) or without a vision token.
pub fn pack(
    samples: &[Sample],
    chunk_tokens: usize,
    device: &Device,
) -> std::result::Result<(Batch, Vec<Tensor>), crate::Error> {
    if samples.is_empty() {
        return Err(CalibrateError::NoSamples.into());
    }
    for (index, s) in samples.iter().enumerate() {
        for (kind, what) in [(Kind::Answer, "an answer token"), (Kind::Vision, "a vision token")] {
            if !s.kinds[1..].contains(&kind) {
                return Err(CalibrateError::SampleWithout { index, what }.into());
            }
        }
    }
    let mut chunks = Vec::new();
    let mut inputs = Vec::new();
    let mut at = 0;
    while at < samples.len() {
        let mut chunk = Chunk { spans: Vec::new(), kinds: Vec::new(), ids: Vec::new() };
        let mut parts = Vec::new();
        while at < samples.len() && chunk.tokens() < chunk_tokens {
            let s = &samples[at];
            chunk.spans.push(Span { start: chunk.tokens(), len: s.kinds.len(), real: s.real });
            chunk.kinds.extend(&s.kinds);
            chunk.ids.extend(&s.ids);
            parts.push(s.embeds.clone());
            at += 1;
        }
        inputs.push(concat(&parts)?.to_device(device)?);
        chunks.push(chunk);
    }
    let count = |kind: Kind| samples.iter().flat_map(|s| &s.kinds).filter(|&&k| k == kind).count();
    let batch = Batch {
        samples: samples.len(),
        vision: count(Kind::Vision),
        answer: count(Kind::Answer),
        tokens: samples.iter().map(|s| s.kinds.len()).sum(),
        longest: samples.iter().map(|s| s.kinds.len()).max().unwrap_or(0),
        chunks,
    };
    Ok((batch, inputs))
}

fn concat(parts: &[Tensor]) -> Result<Tensor> {
    Tensor::cat(parts, 0)
}
