//! The tensors of a text model under GGUF's names: one table for whoever reads, plans, quantises or rotates them.
use super::config::TextConfig;
use super::groups::{Group, Producer};
use super::{Error, LinearName};
use candle_core::{Device, Tensor};

/// Where tensors come from: a GGUF file, or a checkpoint whose front knows what they are called there.
pub trait Weights: Sync {
    fn contains(&self, name: &str) -> bool;

    /// A tensor's values, row by row, shape `[out, in]` or `[n]`: laid out as llama.cpp's converter writes them.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or holds NaN or infinity; the message names it.
    fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error>;

    /// The same on a device. Overridden where fewer bytes than f32's can be moved there.
    ///
    /// # Errors
    /// As [`Weights::f32`]; it does not fit the device.
    fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, Error> {
        Ok(Tensor::from_vec(self.f32(name, shape)?, shape, device)?)
    }
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorRole {
    Embedding,
    /// The gain of the last norm.
    OutputNorm,
    /// The head; without it, the embedding is the head.
    Output,
    /// Divides the pairs' rotary angles (Llama 3).
    RopeFactors,
    /// The gain of a norm before linears: scales and rotations fold into it.
    Norm(Producer),
    /// A gain that nothing folds into: of a head's q or k, or behind the attention or the MLP.
    FixedNorm,
    Weight(LinearName),
    Bias(LinearName),
}

/// How a tensor meets the residual stream, for a rotation of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamSide {
    /// Its columns read the stream.
    Reads,
    /// Its rows, or its values, are added to the stream.
    Writes,
    /// The rows of the embedding are vectors of the stream.
    Rows,
    /// Neither.
    Inside,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecoderTensor {
    pub name: String,
    /// Outermost dimension first; GGUF lists it the other way round.
    pub shape: Vec<usize>,
    pub role: TensorRole,
    /// The block it belongs to.
    pub layer: Option<usize>,
    /// Files may be without it.
    pub optional: bool,
}

impl DecoderTensor {
    /// Whether it is what quantisation types are about.
    pub fn is_decoder_linear(&self) -> bool {
        matches!(self.role, TensorRole::Weight(_))
    }

    pub fn group(&self) -> Option<Group> {
        match self.role {
            TensorRole::Weight(name) => Some(Group::of(name)),
            _ => None,
        }
    }

    pub fn stream(&self) -> StreamSide {
        match self.role {
            TensorRole::Embedding => StreamSide::Rows,
            TensorRole::Weight(LinearName::O | LinearName::Down)
            | TensorRole::Bias(LinearName::O | LinearName::Down) => StreamSide::Writes,
            TensorRole::Weight(LinearName::Q | LinearName::K | LinearName::V | LinearName::Gate | LinearName::Up)
            | TensorRole::Output => StreamSide::Reads,
            _ => StreamSide::Inside,
        }
    }
}

impl LinearName {
    /// As in `blk.N.<this>.weight`.
    pub fn part(self) -> &'static str {
        match self {
            LinearName::Q => "attn_q",
            LinearName::K => "attn_k",
            LinearName::V => "attn_v",
            LinearName::O => "attn_output",
            LinearName::Gate => "ffn_gate",
            LinearName::Up => "ffn_up",
            LinearName::Down => "ffn_down",
        }
    }
}

impl LinearName {
    /// The tensor `blk.<layer>.<part>.weight`.
    pub fn weight(self, layer: usize) -> String {
        in_block(layer, &format!("{}.weight", self.part()))
    }

    /// Its bias.
    pub fn bias(self, layer: usize) -> String {
        in_block(layer, &format!("{}.bias", self.part()))
    }
}

/// `blk.<layer>.<rest>`.
pub fn in_block(layer: usize, rest: &str) -> String {
    format!("blk.{layer}.{rest}")
}

pub(super) const EMBEDDING: &str = "token_embd.weight";
pub(super) const OUTPUT_NORM: &str = "output_norm.weight";
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Every tensor that a model may have, in the order in which they are written.
pub fn tensors(c: &TextConfig) -> Vec<DecoderTensor> {
    let (arch, hidden, vocab) = (c.arch, c.hidden_size, c.vocab_size);
    let mut all = Vec::new();
    let mut push = |name: String, shape: &[usize], role, layer, optional| {
        all.push(DecoderTensor { name, shape: shape.to_vec(), role, layer, optional });
    };
    push(EMBEDDING.into(), &[vocab, hidden], TensorRole::Embedding, None, false);
    push(OUTPUT_NORM.into(), &[hidden], TensorRole::OutputNorm, None, false);
    push(OUTPUT.into(), &[vocab, hidden], TensorRole::Output, None, true);
    push(ROPE_FACTORS.into(), &[c.head_dim / 2], TensorRole::RopeFactors, None, true);
    for layer in 0..c.num_layers {
        let mut norm = |part: &str, width: usize, role| {
            push(in_block(layer, &format!("{part}.weight")), &[width], role, Some(layer), false);
        };
        norm("attn_norm", hidden, TensorRole::Norm(Producer::AttnNorm));
        norm("ffn_norm", hidden, TensorRole::Norm(Producer::MlpNorm));
        if arch.qk_norms {
            ["attn_q_norm", "attn_k_norm"].iter().for_each(|part| norm(part, c.head_dim, TensorRole::FixedNorm));
        }
        if arch.post_norms {
            ["post_attention_norm", "post_ffw_norm"].iter().for_each(|part| norm(part, hidden, TensorRole::FixedNorm));
        }
        for name in LinearName::ALL {
            let (part, shape) = (name.part(), c.shape(name));
            push(in_block(layer, &format!("{part}.weight")), &shape, TensorRole::Weight(name), Some(layer), false);
            let may = arch.may_be_biased.contains(&name);
            if may || arch.biased.contains(&name) {
                let bias = in_block(layer, &format!("{part}.bias"));
                push(bias, &shape[..1], TensorRole::Bias(name), Some(layer), may);
            }
        }
    }
    all
}
