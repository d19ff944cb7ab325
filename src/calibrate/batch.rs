//! The calibration batch: samples packed into chunks, with the masks that the loss needs.
use super::CalibrateError;
use super::stream::{Room, Stream};
use crate::text::ops::add_to;
use crate::text::{SampleLayout, Span};
use candle_core::{Result, Tensor, bail};
use std::sync::Arc;

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
    /// What attention has to know of the tokens beside their order.
    pub layout: Option<Arc<SampleLayout>>,
    /// Features that are added to the stream behind the first blocks, `[tokens, hidden]` each, zeros at text; a sample
    /// without a picture may have none.
    pub injections: Vec<Tensor>,
}

impl Sample {
    /// A sample without padding, whose positions are 0, 1, 2, ….
    pub fn new(embeds: Tensor, kinds: Vec<Kind>, ids: Vec<u32>) -> Self {
        let real = kinds.len();
        Sample { embeds, kinds, ids, real, layout: None, injections: Vec::new() }
    }
}

/// Samples packed in one matrix.
#[derive(Debug, Clone, Default)]
pub struct Chunk {
    pub spans: Vec<Span>,
    pub kinds: Vec<Kind>,
    pub ids: Vec<u32>,
    /// What is added to the stream behind each of the first blocks, and the chunk's place in these streams.
    injections: Option<(Arc<Vec<Stream>>, usize)>,
}

impl Chunk {
    pub fn new(spans: Vec<Span>, kinds: Vec<Kind>, ids: Vec<u32>) -> Self {
        Chunk { spans, kinds, ids, ..Chunk::default() }
    }

    /// What leaves block `layer` for the next one, given the block's own output, which may be overwritten.
    ///
    /// # Errors
    /// What is added cannot be had from where it waits.
    pub fn inject(&self, layer: usize, output: Tensor) -> Result<Tensor> {
        match &self.injections {
            Some((streams, at)) if layer < streams.len() => add_to(output, &streams[layer].get(*at)?),
            _ => Ok(output),
        }
    }

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
    /// Of the samples in `parts`; then of the chunks that have some, by block, and which these are.
    open_injections: Vec<Vec<Tensor>>,
    injections: Vec<Stream>,
    injected: Vec<usize>,
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
            open_injections: Vec::new(),
            injections: Vec::new(),
            injected: Vec::new(),
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
        self.open.spans.push(Span { start: self.open.tokens(), len, real: sample.real, layout: sample.layout });
        self.open.kinds.extend(&sample.kinds);
        self.open.ids.extend(&sample.ids);
        self.parts.push(sample.embeds);
        self.open_injections.push(sample.injections);
        if self.open.tokens() >= self.chunk_tokens { Ok(self.close()?) } else { Ok(()) }
    }

    fn close(&mut self) -> Result<()> {
        if !self.parts.is_empty() {
            self.close_injections()?;
            self.inputs.push(Tensor::cat(&std::mem::take(&mut self.parts), 0)?)?;
            self.batch.chunks.push(std::mem::take(&mut self.open));
        }
        Ok(())
    }

    /// Joins the open samples' injections; those of a sample without are zeros.
    fn close_injections(&mut self) -> Result<()> {
        let open = std::mem::take(&mut self.open_injections);
        let blocks = open.iter().map(Vec::len).max().unwrap_or(0);
        if blocks == 0 {
            return Ok(());
        }
        if self.injections.is_empty() {
            self.injections = (0..blocks).map(|_| self.inputs.room().stream()).collect();
        }
        if self.injections.len() != blocks || open.iter().any(|all| !all.is_empty() && all.len() != blocks) {
            bail!("samples whose pictures' features enter different numbers of blocks");
        }
        for (block, stream) in self.injections.iter_mut().enumerate() {
            let of =
                |(all, x): (&Vec<Tensor>, &Tensor)| all.get(block).map_or_else(|| x.zeros_like(), |t| Ok(t.clone()));
            stream.push(Tensor::cat(&open.iter().zip(&self.parts).map(of).collect::<Result<Vec<_>>>()?, 0)?)?;
        }
        self.injected.push(self.batch.chunks.len());
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
        let streams = Arc::new(self.injections);
        for (at, &chunk) in self.injected.iter().enumerate() {
            self.batch.chunks[chunk].injections = Some((streams.clone(), at));
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn sample(tokens: usize, features: &[f32]) -> Sample {
        let whole = |v: f32| (Tensor::ones((tokens, 2), DType::F32, &Device::Cpu).unwrap() * f64::from(v)).unwrap();
        let mut kinds = vec![Kind::Vision; tokens - 1];
        kinds.push(Kind::Answer);
        let mut sample = Sample::new(whole(1.0), kinds, vec![0; tokens]);
        sample.injections = features.iter().map(|&v| whole(v)).collect();
        sample
    }

    /// Features reach their own tokens behind their own block, whichever chunks have some.
    #[test]
    fn features_are_added_where_they_belong() {
        let room = Room::new(&Device::Cpu, 1 << 20, std::path::Path::new("."));
        let samples = [sample(3, &[]), sample(2, &[]), sample(2, &[10.0, 20.0]), sample(3, &[30.0, 40.0])];
        let (batch, x) = pack(&samples, 3, &room).unwrap();
        assert_eq!(batch.chunks.len(), 3);
        let after = |chunk: usize, layer: usize| -> Vec<f32> {
            let y = batch.chunks[chunk].inject(layer, x.get(chunk).unwrap().copy().unwrap()).unwrap();
            y.narrow(1, 0, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(after(0, 0), [1.0; 3]);
        assert_eq!((after(1, 0), after(1, 1)), (vec![1.0, 1.0, 11.0, 11.0], vec![1.0, 1.0, 21.0, 21.0]));
        assert_eq!((after(2, 0), after(2, 1), after(2, 2)), (vec![31.0; 3], vec![41.0; 3], vec![1.0; 3]));
        let mixed = pack(&[sample(2, &[1.0]), sample(2, &[1.0, 2.0])], 9, &room).unwrap_err().to_string();
        assert!(mixed.contains("different numbers of blocks"), "{mixed}");
    }
}
