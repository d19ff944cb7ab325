//! Of which type each tensor of a GGUF file is written.
use super::types::{FileType, LinearKind, Role, fitting};
use crate::front::TensorSpec;
use crate::ggml::GgmlType;
use std::collections::BTreeMap;

/// One tensor of the file to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub name: String,
    /// Outermost dimension first; GGUF lists it the other way round.
    pub shape: Vec<usize>,
    pub ty: GgmlType,
    /// What was asked for, where its blocks do not fit the rows.
    pub fallback_from: Option<GgmlType>,
    /// A linear of the decoder: what `--type` is about.
    pub is_decoder_linear: bool,
}

impl Planned {
    /// As it is stored.
    fn kept(t: &TensorSpec) -> Self {
        Planned {
            name: t.name.clone(),
            shape: t.shape.clone(),
            ty: t.stored,
            fallback_from: None,
            is_decoder_linear: false,
        }
    }

    fn of(t: &TensorSpec, wanted: GgmlType) -> Self {
        let mut this = Self::kept(t);
        this.ty = fitting(wanted, this.row());
        this.fallback_from = (this.ty != wanted).then_some(wanted);
        this
    }

    /// Values in a row: what a type's blocks have to divide.
    pub fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.elements() / self.row().max(1)
    }

    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        // invariant: the plan gives a tensor only a type that its rows fit.
        self.ty.row_size(self.row()).map_or(0, |row| (row * self.rows()) as u64)
    }

    /// Bytes of its line in a file's list of tensors: name and dimensions, each with their number, type, offset.
    pub(super) fn listed_bytes(&self) -> u64 {
        let rank = self.shape.iter().position(|&d| d != 1).map_or(1, |first| self.shape.len() - first);
        (8 + self.name.len() + 4 + 8 * rank + 4 + 8) as u64
    }
}

/// The language model's types.
#[derive(Debug, Clone, PartialEq)]
pub struct TypeChoice {
    pub file: FileType,
    /// Of the embedding, which is also the output head of a tied model.
    pub embedding: Option<GgmlType>,
    pub output: Option<GgmlType>,
    /// Decoder linears of another type than `file` says, by tensor name.
    pub linears: BTreeMap<String, GgmlType>,
}

impl TypeChoice {
    /// `file`, and its own types for embedding and output.
    pub fn of(file: FileType) -> Self {
        TypeChoice { file, embedding: None, output: None, linears: BTreeMap::new() }
    }
}

/// What a decoder's tensor is for, by its name: `None` for what is kept as it is stored.
///
/// The linears are those of llama.cpp's architectures without experts; of others (fused, state-space, experts) every
/// matrix of a block is one, but for the small ones that llama-quantize keeps too.
fn role(t: &TensorSpec) -> Option<Role> {
    match t.name.as_str() {
        "token_embd.weight" => return Some(Role::Embedding),
        "output.weight" => return Some(Role::Output),
        _ => (),
    }
    let (layer, part) = t.name.strip_prefix("blk.")?.split_once('.')?;
    let layer = layer.parse().ok()?;
    let part = part.strip_suffix(".weight")?;
    let linear = match part {
        "attn_v" => LinearKind::AttentionV,
        "attn_output" => LinearKind::AttentionOutput,
        "ffn_down" => LinearKind::FfnDown,
        "attn_q" | "attn_k" | "ffn_gate" | "ffn_up" => LinearKind::Other,
        _ if t.shape.len() < 2 || SMALL.iter().any(|small| part.contains(small)) => return None,
        _ => LinearKind::Other,
    };
    Some(Role::Linear(linear, layer))
}

/// Parts of the names of matrices that are small or sensitive (llama.cpp's `tensor_allows_quantization`).
const SMALL: [&str; 10] =
    ["norm", "ffn_gate_inp", "conv1d", "shortconv", "time_mix", "rel_b", "altup", "laurel", "per_layer", "pos_embd"];

/// The tensors of a file that quantises nothing.
pub fn stored(tensors: &[TensorSpec]) -> Vec<Planned> {
    tensors.iter().map(Planned::kept).collect()
}

/// The tensors of a language model in the source's order.
pub fn text(tensors: &[TensorSpec], types: &TypeChoice) -> Vec<Planned> {
    let layer = |t: &TensorSpec| match role(t) {
        Some(Role::Linear(_, layer)) => layer + 1,
        _ => 0,
    };
    let layers = tensors.iter().map(layer).max().unwrap_or(0);
    let tied = !tensors.iter().any(|t| t.name == "output.weight");
    // llama.cpp takes 80 layers for a 70B model.
    let large = layers == 80;
    let plan = |t: &TensorSpec| {
        let Some(role) = role(t) else { return Planned::kept(t) };
        let row = t.shape.last().copied().unwrap_or(1);
        let wanted = types.file.tensor_type(role, layers, row, tied, large);
        let given = match role {
            Role::Embedding => types.embedding,
            Role::Output => types.output,
            Role::Linear(..) => types.linears.get(&t.name).copied(),
        };
        let mut planned = Planned::of(t, given.unwrap_or(wanted));
        planned.is_decoder_linear = matches!(role, Role::Linear(..));
        planned
    };
    tensors.iter().map(plan).collect()
}

/// Gemma 3's projector, which the runtime transposes: it has no blocks.
const TRANSPOSED: &str = "mm.input_projection.weight";

/// The tensors of a tower and its projector: the linears as `ty`, all else as stored. Convolutions follow where `ty` is a
/// float, the runtime wants them in f16 or f32; one that is stored in f32 stays so, for it rounds the pixels to the type
/// of the weights. Without `ty` everything is kept.
pub fn vision(tensors: &[TensorSpec], ty: Option<GgmlType>) -> Vec<Planned> {
    let Some(ty) = ty else { return stored(tensors) };
    let plan = |t: &TensorSpec| {
        let of_linear = ["v.blk.", "a.blk.", "v.deepstack.", "mm."].iter().any(|start| t.name.starts_with(start));
        // Qwen's convolution over two pictures is two tensors.
        let weight = t.name.ends_with(".weight") || t.name.ends_with(".weight.1");
        match t.shape.len() {
            2 if t.name == TRANSPOSED && ty.is_quantized() => Planned::kept(t),
            2 if of_linear && weight => Planned::of(t, ty),
            4.. if weight && !ty.is_quantized() && t.stored != GgmlType::F32 => Planned::of(t, ty),
            _ => Planned::kept(t),
        }
    };
    tensors.iter().map(plan).collect()
}
