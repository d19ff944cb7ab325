//! Which tensors a GGUF file gets, from where, and of which type.
use super::types::{FileType, Linear, Role, fitting};
use crate::ggml::GgmlType;
use crate::model::{TextConfig, VisionArch, VisionConfig};
use std::collections::BTreeMap;

/// One tensor of the file to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Name in the GGUF.
    pub name: String,
    /// Canonical name in the checkpoint.
    pub source: String,
    /// The checkpoint's shape, outermost dimension first; GGUF lists it the other way round.
    pub shape: Vec<usize>,
    pub ty: GgmlType,
    /// What was asked for, where its blocks do not fit the rows.
    pub fallback_from: Option<GgmlType>,
    /// A linear of the decoder: what `--type` is about.
    pub is_decoder_linear: bool,
}

impl Planned {
    fn f32(name: impl Into<String>, source: impl Into<String>, shape: &[usize]) -> Self {
        Planned {
            name: name.into(),
            source: source.into(),
            shape: shape.to_vec(),
            ty: GgmlType::F32,
            fallback_from: None,
            is_decoder_linear: false,
        }
    }

    fn weight(name: impl Into<String>, source: impl Into<String>, shape: &[usize], wanted: GgmlType) -> Self {
        let mut this = Self::f32(name, source, shape);
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
}

/// The language model's types.
#[derive(Debug, Clone, PartialEq)]
pub struct TypeChoice {
    pub file: FileType,
    /// Of the embedding, which is also the output head of a tied model.
    pub embedding: Option<GgmlType>,
    pub output: Option<GgmlType>,
    /// Decoder linears of another type than `file` says, by canonical name.
    pub linears: BTreeMap<String, GgmlType>,
}

impl TypeChoice {
    /// `file`, and its own types for embedding and output.
    pub fn of(file: FileType) -> Self {
        TypeChoice { file, embedding: None, output: None, linears: BTreeMap::new() }
    }
}

/// The tensors of a language model, in file order: embedding, output, blocks.
pub fn text(c: &TextConfig, types: &TypeChoice) -> Vec<Planned> {
    let hidden = c.hidden_size;
    let choose = |role| types.file.tensor_type(role, c.num_layers, hidden, c.tie_word_embeddings, false);
    let embedding = types.embedding.unwrap_or_else(|| choose(Role::Embedding));
    let vocab = [c.vocab_size, hidden];
    let mut plan = vec![
        Planned::weight("token_embd.weight", "language_model.model.embed_tokens.weight", &vocab, embedding),
        Planned::f32("output_norm.weight", "language_model.model.norm.weight", &[hidden]),
    ];
    if !c.tie_word_embeddings {
        let output = types.output.unwrap_or_else(|| choose(Role::Output));
        plan.push(Planned::weight("output.weight", "language_model.lm_head.weight", &vocab, output));
    }
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    // llama.cpp takes 80 layers for a 70B model.
    let large = c.num_layers == 80;
    for layer in 0..c.num_layers {
        let (to, from) = (format!("blk.{layer}"), format!("language_model.model.layers.{layer}"));
        let mut norm = |to_part: &str, from_part: &str| {
            plan.push(Planned::f32(format!("{to}.{to_part}.weight"), format!("{from}.{from_part}.weight"), &[hidden]));
        };
        norm("attn_norm", "input_layernorm");
        norm("ffn_norm", "post_attention_layernorm");
        let inner = c.intermediate_size;
        let linears = [
            ("attn_q", "self_attn.q_proj", q, hidden, Linear::Other, c.qkv_bias),
            ("attn_k", "self_attn.k_proj", kv, hidden, Linear::Other, c.qkv_bias),
            ("attn_v", "self_attn.v_proj", kv, hidden, Linear::AttentionV, c.qkv_bias),
            ("attn_output", "self_attn.o_proj", hidden, q, Linear::AttentionOutput, false),
            ("ffn_gate", "mlp.gate_proj", inner, hidden, Linear::Other, false),
            ("ffn_up", "mlp.up_proj", inner, hidden, Linear::Other, false),
            ("ffn_down", "mlp.down_proj", hidden, inner, Linear::FfnDown, false),
        ];
        for (to_part, from_part, rows, cols, linear, bias) in linears {
            let role = Role::Linear(linear, layer);
            let wanted = types.file.tensor_type(role, c.num_layers, cols, c.tie_word_embeddings, large);
            let (name, source) = (format!("{to}.{to_part}"), format!("{from}.{from_part}"));
            let tensor = format!("{source}.weight");
            let wanted = types.linears.get(&tensor).copied().unwrap_or(wanted);
            let mut weight = Planned::weight(format!("{name}.weight"), tensor, &[rows, cols], wanted);
            weight.is_decoder_linear = true;
            plan.push(weight);
            if bias {
                plan.push(Planned::f32(format!("{name}.bias"), format!("{source}.bias"), &[rows]));
            }
        }
    }
    plan
}

/// The tensors of tower, projector and `image_newline`, of the blocks that run only.
///
/// `width` is the language model's. The patch embedding is a convolution, which the runtime wants in f16 or f32.
pub fn vision(c: &VisionConfig, width: usize, ty: GgmlType, projector_bias: bool) -> Vec<Planned> {
    let (hidden, patch) = (c.hidden_size, c.patch_size);
    let conv = if ty.is_quantized() { GgmlType::F16 } else { ty };
    let clip = c.arch == VisionArch::Clip;
    let tower = |part: &str| format!("vision_tower.vision_model.{part}");
    let mut plan = vec![Planned::weight(
        "v.patch_embd.weight",
        tower("embeddings.patch_embedding.weight"),
        &[hidden, 3, patch, patch],
        conv,
    )];
    let positions = c.grid() * c.grid() + usize::from(clip);
    let mut vector = |name: &str, source: String, shape: &[usize]| plan.push(Planned::f32(name, source, shape));
    vector("v.position_embd.weight", tower("embeddings.position_embedding.weight"), &[positions, hidden]);
    if clip {
        vector("v.class_embd", tower("embeddings.class_embedding"), &[hidden]);
        vector("v.pre_ln.weight", tower("pre_layrnorm.weight"), &[hidden]);
        vector("v.pre_ln.bias", tower("pre_layrnorm.bias"), &[hidden]);
    } else {
        vector("v.patch_embd.bias", tower("embeddings.patch_embedding.bias"), &[hidden]);
    }
    for layer in 0..c.used_layers {
        let (to, from) = (format!("v.blk.{layer}"), tower(&format!("encoder.layers.{layer}")));
        for (to_part, from_part) in [("ln1", "layer_norm1"), ("ln2", "layer_norm2")] {
            for kind in ["weight", "bias"] {
                plan.push(Planned::f32(
                    format!("{to}.{to_part}.{kind}"),
                    format!("{from}.{from_part}.{kind}"),
                    &[hidden],
                ));
            }
        }
        let linears = [
            ("attn_q", "self_attn.q_proj", hidden, hidden),
            ("attn_k", "self_attn.k_proj", hidden, hidden),
            ("attn_v", "self_attn.v_proj", hidden, hidden),
            ("attn_out", "self_attn.out_proj", hidden, hidden),
            ("ffn_up", "mlp.fc1", c.intermediate_size, hidden),
            ("ffn_down", "mlp.fc2", hidden, c.intermediate_size),
        ];
        for (to_part, from_part, rows, cols) in linears {
            let (name, source) = (format!("{to}.{to_part}"), format!("{from}.{from_part}"));
            plan.push(Planned::weight(format!("{name}.weight"), format!("{source}.weight"), &[rows, cols], ty));
            plan.push(Planned::f32(format!("{name}.bias"), format!("{source}.bias"), &[rows]));
        }
    }
    for (to, from, cols) in [("mm.0", "linear_1", hidden), ("mm.2", "linear_2", width)] {
        let source = format!("multi_modal_projector.{from}");
        plan.push(Planned::weight(format!("{to}.weight"), format!("{source}.weight"), &[width, cols], ty));
        if projector_bias {
            plan.push(Planned::f32(format!("{to}.bias"), format!("{source}.bias"), &[width]));
        }
    }
    plan.push(Planned::f32("v.image_newline", "image_newline", &[width]));
    plan
}
