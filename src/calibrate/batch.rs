//! The calibration batch: samples packed into chunks, with the masks that the loss needs.
use super::CalibrateError;
use super::stream::{Room, Stream};
use crate::text::Span;
use candle_core::{Result, Tensor};

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

/// A question and its answer, with a picture or without, embedded.
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
#[derive(Debug, Clone, Default)]
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

impl Batch {
    /// Samples with a picture.
    pub fn pictures(&self) -> usize {
        let seen = |chunk: &Chunk, s: &Span| chunk.kinds[s.start..s.start + s.len].contains(&Kind::Vision);
        self.chunks.iter().map(|c| c.spans.iter().filter(|s| seen(c, s)).count()).sum()
    }
}

/// Packs samples, one after the other, into chunks of at least `chunk_tokens` tokens.
pub struct Packer {
    chunk_tokens: usize,
    open: Chunk,
    parts: Vec<Tensor>,
    batch: Batch,
    inputs: Stream,
}

impl Packer {
    /// The chunks' embeddings wait in `room`.
    pub fn new(chunk_tokens: usize, room: &Room) -> Self {
        Packer {
            chunk_tokens,
            open: Chunk::default(),
            parts: Vec::new(),
            batch: Batch { chunks: Vec::new(), samples: 0, vision: 0, answer: 0, tokens: 0, longest: 0 },
            inputs: room.stream(),
        }
    }

    /// # Errors
    /// A sample without an answer token (its loss would be NaN); no room for it.
    pub fn push(&mut self, sample: Sample) -> std::result::Result<(), crate::Error> {
        let index = self.batch.samples;
        if !sample.kinds[1..].contains(&Kind::Answer) {
            return Err(CalibrateError::SampleWithout { index, what: "an answer token" }.into());
        }
        let (len, b) = (sample.kinds.len(), &mut self.batch);
        let count = |kind: Kind| sample.kinds.iter().filter(|&&k| k == kind).count();
        (b.samples, b.tokens, b.longest) = (b.samples + 1, b.tokens + len, b.longest.max(len));
        (b.vision, b.answer) = (b.vision + count(Kind::Vision), b.answer + count(Kind::Answer));
        self.open.spans.push(Span { start: self.open.tokens(), len, real: sample.real });
        self.open.kinds.extend(&sample.kinds);
        self.open.ids.extend(&sample.ids);
        self.parts.push(sample.embeds);
        if self.open.tokens() >= self.chunk_tokens { Ok(self.close()?) } else { Ok(()) }
    }

    fn close(&mut self) -> Result<()> {
        if !self.parts.is_empty() {
            self.inputs.push(Tensor::cat(&std::mem::take(&mut self.parts), 0)?)?;
            self.batch.chunks.push(std::mem::take(&mut self.open));
        }
        Ok(())
    }

    /// The batch and its chunks' embeddings.
    ///
    /// # Errors
    /// No samples; no room.
    pub fn finish(mut self) -> std::result::Result<(Batch, Stream), crate::Error> {
        self.close()?;
        if self.batch.samples == 0 {
            return Err(CalibrateError::NoSamples.into());
        }
        Ok((self.batch, self.inputs))
    }
}

/// Packs `samples` in order.
///
/// # Errors
/// As [`Packer`]'s.
pub fn pack(
    samples: &[Sample],
    chunk_tokens: usize,
    room: &Room,
) -> std::result::Result<(Batch, Stream), crate::Error> {
    let mut packer = Packer::new(chunk_tokens, room);
    samples.iter().try_for_each(|s| packer.push(s.clone()))?;
    packer.finish()
}
