//! The decoder block that every supported text model shares: `h = x + Attn(norm1 x); y = h + MLP(norm2 h)` with
//! grouped-query attention, rotary positions and SwiGLU, and its vector-Jacobian product by hand (candle's autograd
//! needs 2.5 times the time and twice the memory).
//!
//! Samples are packed: a matrix `[tokens, hidden]` holds several, and [`Span`] says where each begins and ends.
use super::ops::{
    add, add_row, add_to, causal_softmax, rms_backward, rms_norm, rope_tables, rotate, silu_mul, silu_mul_backward,
    softmax_backward,
};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::model::TextConfig;
use candle_core::{D, DType, Device, Result, Tensor};
use std::ops::Range;

/// Bytes of attention scores that are held at once, where one key head's are not more.
pub const SCORES: usize = 256 << 20;

/// Queries whose scores are made together, about; keys that stand after all of them are left out.
const QUERIES: usize = if cfg!(test) { 2 } else { 86 };

/// Divides `n` queries, one or more; no part is empty.
fn query_parts(n: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let parts = (n / QUERIES).clamp(1, 8);
    (0..parts).map(move |i| n * i / parts..n * (i + 1) / parts)
}

/// `all` `[heads, n, d]` with `first`, of fewer rows, added to its first rows.
fn add_first(all: Option<Tensor>, first: Tensor) -> Result<Tensor> {
    let Some(all) = all else { return Ok(first) };
    let (rows, n) = (first.dim(1)?, all.dim(1)?);
    Tensor::cat(&[add_to(first, &all.narrow(1, 0, rows)?)?, all.narrow(1, rows, n - rows)?], 1)
}

/// One sample's rows in a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    /// Rows, padding included.
    pub len: usize,
    /// Rows that are tokens; later ones are padding, which no row attends to.
    pub real: usize,
}

/// `y = x W^T + b`, W of `[out, in]`.
#[derive(Debug, Clone)]
pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => add_row(y, bias),
            None => Ok(y),
        }
    }

    /// Gradient at the input.
    fn backward(&self, g: &Tensor) -> Result<Tensor> {
        g.matmul(&self.weight)
    }
}

/// The seven linears, in the order of the tensors' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Name {
    pub const ALL: [Name; 7] = [Name::Q, Name::K, Name::V, Name::O, Name::Gate, Name::Up, Name::Down];

    /// As in `language_model.model.layers.N.<this>.weight`.
    pub fn path(self) -> &'static str {
        match self {
            Name::Q => "self_attn.q_proj",
            Name::K => "self_attn.k_proj",
            Name::V => "self_attn.v_proj",
            Name::O => "self_attn.o_proj",
            Name::Gate => "mlp.gate_proj",
            Name::Up => "mlp.up_proj",
            Name::Down => "mlp.down_proj",
        }
    }
}

/// `language_model.model.layers.<layer>.<rest>`.
pub fn tensor_name(layer: usize, rest: &str) -> String {
    format!("language_model.model.layers.{layer}.{rest}")
}

/// Rotary angles' cosines and sines, `[positions, head_dim / 2]`.
#[derive(Debug, Clone)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub fn new(config: &TextConfig, positions: usize, device: &Device) -> Result<Self> {
        let (cos, sin) = rope_tables(positions, config.head_dim, config.rope_theta, device)?;
        Ok(Rope { cos, sin })
    }

    fn apply(&self, x: &Tensor, backward: bool) -> Result<Tensor> {
        let n = x.dim(1)?;
        rotate(x, &self.cos.narrow(0, 0, n)?, &self.sin.narrow(0, 0, n)?, backward)
    }

    /// The same where row i of a head stands at position `positions[i]`.
    fn apply_at(&self, x: &Tensor, positions: &[usize]) -> Result<Tensor> {
        let at: Vec<u32> = positions.iter().map(|&p| p as u32).collect();
        let at = Tensor::new(at, x.device())?;
        rotate(x, &self.cos.index_select(&at, 0)?, &self.sin.index_select(&at, 0)?, false)
    }
}

/// A block's weights in f32.
#[derive(Debug, Clone)]
pub struct Block {
    pub norm1: Tensor,
    pub norm2: Tensor,
    pub linears: [Linear; 7],
    pub rope: Rope,
    eps: f64,
    kv_heads: usize,
    /// Query heads per key head.
    repeats: usize,
    head_dim: usize,
}

/// What enters each linear, and the outputs that quantisation errors are measured on; all `[tokens, …]`.
#[derive(Debug, Clone)]
pub struct Trace {
    /// norm1(x), the input of q, k, v.
    pub attn_in: Tensor,
    /// The heads' outputs, the input of o.
    pub o_in: Tensor,
    /// The output of o.
    pub attn_out: Tensor,
    /// x + attn_out.
    pub h: Tensor,
    /// norm2(h), the input of gate and up.
    pub mlp_in: Tensor,
    /// silu(gate) * up, the input of down.
    pub down_in: Tensor,
    /// The output of down.
    pub mlp_out: Tensor,
    /// With [`Block::trace_all`].
    pub made: Option<Made>,
}

/// What the way back needs beside x and h: the outputs of the linears named so.
#[derive(Debug, Clone)]
pub struct Made {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
}

impl Trace {
    /// The block's output.
    pub fn output(&self) -> Result<Tensor> {
        add(&self.h, &self.mlp_out)
    }
}

/// Gradients of the loss, all `[tokens, hidden]`.
pub struct Gradients {
    /// At the block's input.
    pub input: Tensor,
    /// At the output of o_proj (and at x, before the attention's own part is added).
    pub attn_out: Tensor,
}

/// Reads a tensor, f32. On an accelerator it is widened there, half of the bytes on the way.
pub(super) fn read(
    checkpoint: &Checkpoint,
    name: &str,
    shape: &[usize],
    device: &Device,
) -> std::result::Result<Tensor, crate::Error> {
    if !device.is_cpu() {
        checkpoint.check(name, shape)?;
        let view = checkpoint.tensor(name)?;
        let dtype = DType::try_from(view.dtype)?;
        let t = Tensor::from_raw_buffer(view.bytes, dtype, shape, device)?.to_dtype(DType::F32)?;
        // Zero times a number that is not finite is none.
        let finite = (&t * 0.0)?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()? == 0.0;
        checkpoint.release(name);
        if finite {
            return Ok(t);
        }
        // Else the same again on the CPU says which number it is.
    }
    let data = checkpoint.f32(name, shape)?;
    checkpoint.release(name);
    Ok(Tensor::from_vec(data, shape, device)?)
}

impl Block {
    /// Reads block `layer`.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or holds NaN or infinity; the message names it.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &TextConfig,
        layer: usize,
        rope: &Rope,
        device: &Device,
    ) -> std::result::Result<Self, crate::Error> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let read = |name: String, shape: &[usize]| read(checkpoint, &name, shape, device);
        let mut linears = Vec::with_capacity(7);
        for name in Name::ALL {
            let shape = match name {
                Name::Q => [q, hidden],
                Name::K | Name::V => [kv, hidden],
                Name::O => [hidden, q],
                Name::Gate | Name::Up => [inner, hidden],
                Name::Down => [hidden, inner],
            };
            let path = tensor_name(layer, name.path());
            let has_bias = config.qkv_bias && matches!(name, Name::Q | Name::K | Name::V);
            let bias = has_bias.then(|| read(format!("{path}.bias"), &shape[..1])).transpose()?;
            linears.push(Linear { weight: read(format!("{path}.weight"), &shape)?, bias });
        }
        let linears = linears.try_into().map_err(|_| CheckpointError::MissingTensor {
            file: checkpoint.dir().into(),
            tensor: tensor_name(layer, ""),
        })?;
        Ok(Block {
            norm1: read(tensor_name(layer, "input_layernorm.weight"), &[hidden])?,
            norm2: read(tensor_name(layer, "post_attention_layernorm.weight"), &[hidden])?,
            linears,
            rope: rope.clone(),
            eps: config.rms_norm_eps,
            kv_heads: config.num_kv_heads,
            repeats: config.num_heads / config.num_kv_heads,
            head_dim: config.head_dim,
        })
    }

    pub fn linear(&self, name: Name) -> &Linear {
        &self.linears[name as usize]
    }

    pub fn linear_mut(&mut self, name: Name) -> &mut Linear {
        &mut self.linears[name as usize]
    }

    /// Query heads per value head, and a head's width.
    pub fn head_shape(&self) -> (usize, usize) {
        (self.repeats, self.head_dim)
    }

    pub fn attn_norm(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.norm1, self.eps)
    }

    pub fn mlp_norm(&self, h: &Tensor) -> Result<Tensor> {
        rms_norm(h, &self.norm2, self.eps)
    }

    /// `[n, heads * d]` to `[heads, n, d]`.
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (n, width) = x.dims2()?;
        x.reshape((n, width / self.head_dim, self.head_dim))?.transpose(0, 1)?.contiguous()
    }

    /// The inverse of `split`.
    fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, n, d) = x.dims3()?;
        x.transpose(0, 1)?.contiguous()?.reshape((n, heads * d))
    }

    /// Query heads that share a key head stand below one another, so that no key is copied:
    /// `[heads, n, d]` to `[kv_heads, repeats * n, d]`.
    fn stack(&self, q: &Tensor) -> Result<Tensor> {
        let (_, n, d) = q.dims3()?;
        q.contiguous()?.reshape((self.kv_heads, self.repeats * n, d))
    }

    /// Key heads whose scores are made together, for `rows` queries of `keys` keys: first, how many.
    fn head_parts(&self, rows: usize, keys: usize) -> impl Iterator<Item = (usize, usize)> {
        let each = 4 * self.repeats * rows * keys;
        let (all, step) = (self.kv_heads, (SCORES / each.max(1)).clamp(1, self.kv_heads));
        (0..all).step_by(step).map(move |at| (at, step.min(all - at)))
    }

    fn probabilities(&self, q: &Tensor, k: &Tensor, positions: &[usize], real: usize) -> Result<Tensor> {
        causal_softmax(q.matmul(&k.t()?)?, 1.0 / (self.head_dim as f64).sqrt(), positions, real)
    }

    /// The heads' outputs from packed q, k, v before rotation.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span]) -> Result<Tensor> {
        let of = |t: &Tensor, span: &Span| t.narrow(0, span.start, span.len);
        let keys = spans.iter().map(|span| Ok((of(k, span)?, of(v, span)?))).collect::<Result<Vec<_>>>()?;
        self.attend_at(q, &keys, spans, None)
    }

    /// The same from each span's keys and values; `q` holds only the packed matrix's rows `rows`, in order.
    pub fn attend_at(
        &self,
        q: &Tensor,
        keys: &[(Tensor, Tensor)],
        spans: &[Span],
        rows: Option<&[u32]>,
    ) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(spans.len());
        let mut from = 0;
        for (span, (k, v)) in spans.iter().zip(keys) {
            let positions: Vec<usize> = match rows {
                None => (0..span.len).collect(),
                Some(rows) => {
                    let inside =
                        rows.iter().map(|&t| t as usize).filter(|t| (span.start..span.start + span.len).contains(t));
                    inside.map(|t| t - span.start).collect()
                }
            };
            let n = positions.len();
            if n == 0 {
                continue;
            }
            let heads = self.split(&q.narrow(0, from, n)?)?;
            let whole = n == span.len;
            let heads = if whole { self.rope.apply(&heads, false)? } else { self.rope.apply_at(&heads, &positions)? };
            let (k, v) = (self.rope.apply(&self.split(k)?, false)?, self.split(v)?);
            for rows in query_parts(n) {
                let (positions, len) = (&positions[rows.clone()], rows.len());
                let keys = positions[len - 1] + 1;
                let q = self.stack(&heads.narrow(1, rows.start, len)?)?;
                let mut outs = Vec::new();
                for (at, heads) in self.head_parts(len, keys) {
                    let of = |t: &Tensor| t.narrow(0, at, heads)?.narrow(1, 0, keys);
                    let p = self.probabilities(&q.narrow(0, at, heads)?, &of(&k)?, positions, span.real)?;
                    outs.push(p.matmul(&of(&v)?)?);
                }
                let out = Tensor::cat(&outs, 0)?;
                parts.push(self.join(&out.reshape((self.kv_heads * self.repeats, len, self.head_dim))?)?);
            }
            from += n;
        }
        Tensor::cat(&parts, 0)
    }

    /// The forward pass with all that enters a linear. `input` is applied to each linear's input first: the
    /// activations' quantiser, or nothing.
    pub fn trace(&self, x: &Tensor, spans: &[Span], input: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Trace> {
        self.traced(x, spans, input, false)
    }

    /// The same with [`Trace::made`], activations as they are.
    pub fn trace_all(&self, x: &Tensor, spans: &[Span]) -> Result<Trace> {
        self.traced(x, spans, &|x| Ok(x.clone()), true)
    }

    fn traced(
        &self,
        x: &Tensor,
        spans: &[Span],
        input: &dyn Fn(&Tensor) -> Result<Tensor>,
        all: bool,
    ) -> Result<Trace> {
        let run = |name: Name, x: &Tensor| self.linear(name).forward(x);
        let attn_in = self.attn_norm(x)?;
        let a = input(&attn_in)?;
        let (q, k, v) = (run(Name::Q, &a)?, run(Name::K, &a)?, run(Name::V, &a)?);
        let o_in = self.attend(&q, &k, &v, spans)?;
        let attn_out = run(Name::O, &input(&o_in)?)?;
        let h = add(x, &attn_out)?;
        let mlp_in = self.mlp_norm(&h)?;
        let m = input(&mlp_in)?;
        let (gate, up) = (run(Name::Gate, &m)?, run(Name::Up, &m)?);
        let made = if all { Some(Made { q, k, v, gate: gate.copy()?, up: up.clone() }) } else { None };
        let down_in = silu_mul(gate, &up)?;
        let mlp_out = run(Name::Down, &input(&down_in)?)?;
        Ok(Trace { attn_in, o_in, attn_out, h, mlp_in, down_in, mlp_out, made })
    }

    /// The block's output.
    pub fn forward(&self, x: &Tensor, spans: &[Span]) -> Result<Tensor> {
        self.trace(x, spans, &|x| Ok(x.clone()))?.output()
    }

    /// The gradient at the input from the gradient `g` at the output; the forward pass is made again from `x`.
    pub fn backward(&self, x: &Tensor, spans: &[Span], g: &Tensor) -> Result<Gradients> {
        let run = |name: Name, x: &Tensor| self.linear(name).forward(x);
        // Forward, up to the MLP's inner product.
        let a = self.attn_norm(x)?;
        let (q, k, v) = (run(Name::Q, &a)?, run(Name::K, &a)?, run(Name::V, &a)?);
        let h = add_to(run(Name::O, &self.attend(&q, &k, &v, spans)?)?, x)?;
        let m = self.mlp_norm(&h)?;
        let (gate, up) = (run(Name::Gate, &m)?, run(Name::Up, &m)?);
        self.backward_from(x, &h, &Made { q, k, v, gate, up }, spans, g)
    }

    /// The same where the forward pass was kept.
    pub fn backward_from(&self, x: &Tensor, h: &Tensor, made: &Made, spans: &[Span], g: &Tensor) -> Result<Gradients> {
        let back = |name: Name, g: &Tensor| self.linear(name).backward(g);
        let Made { q, k, v, gate, up } = made;
        // y = h + down(silu(gate) * up): silu' = sigmoid * (1 + gate * (1 - sigmoid)).
        let g_inner = back(Name::Down, g)?;
        let (g_gate, g_up) = silu_mul_backward(gate, up, &g_inner)?;
        let g_m = add_to(back(Name::Gate, &g_gate)?, &back(Name::Up, &g_up)?)?;
        let g_h = add_to(rms_backward(h, &self.norm2, self.eps, &g_m)?, g)?;

        // h = x + o(attend(q, k, v)), sample by sample.
        let g_o = back(Name::O, &g_h)?;
        let (mut g_q, mut g_k, mut g_v) = (Vec::new(), Vec::new(), Vec::new());
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        for span in spans {
            let of = |t: &Tensor| self.split(&t.narrow(0, span.start, span.len)?);
            let (q, k, v) = (self.rope.apply(&of(q)?, false)?, self.rope.apply(&of(k)?, false)?, of(v)?);
            let g_out = of(&g_o)?;
            let positions: Vec<usize> = (0..span.len).collect();
            // The last queries see all keys; what the others add to keys' gradients is added to the first of these.
            let (mut span_q, mut span_k, mut span_v) = (Vec::new(), None, None);
            for rows in query_parts(span.len).rev() {
                let (positions, len, keys) = (&positions[rows.clone()], rows.len(), rows.end);
                let of = |t: &Tensor| self.stack(&t.narrow(1, rows.start, len)?);
                let (q, g_out) = (of(&q)?, of(&g_out)?);
                let (mut of_q, mut of_k, mut of_v) = (Vec::new(), Vec::new(), Vec::new());
                for (at, heads) in self.head_parts(len, keys) {
                    let of = |t: &Tensor| t.narrow(0, at, heads);
                    let seen = |t: &Tensor| of(t)?.narrow(1, 0, keys);
                    let (q, k, v, g_out) = (of(&q)?, seen(&k)?, seen(&v)?, of(&g_out)?);
                    let p = self.probabilities(&q, &k, positions, span.real)?;
                    of_v.push(p.t()?.matmul(&g_out)?);
                    let g_p = g_out.matmul(&v.t()?)?;
                    let g_s = softmax_backward(&p, g_p, scale)?;
                    of_q.push(g_s.matmul(&k)?);
                    of_k.push(g_s.t()?.matmul(&q)?);
                }
                let back_q = Tensor::cat(&of_q, 0)?.reshape((self.kv_heads * self.repeats, len, self.head_dim))?;
                span_q.push(back_q);
                span_k = Some(add_first(span_k, Tensor::cat(&of_k, 0)?)?);
                span_v = Some(add_first(span_v, Tensor::cat(&of_v, 0)?)?);
            }
            span_q.reverse();
            g_q.push(self.join(&self.rope.apply(&Tensor::cat(&span_q, 1)?, true)?)?);
            if let (Some(k), Some(v)) = (span_k, span_v) {
                g_k.push(self.join(&self.rope.apply(&k, true)?)?);
                g_v.push(self.join(&v)?);
            }
        }
        let (g_q, g_k, g_v) = (Tensor::cat(&g_q, 0)?, Tensor::cat(&g_k, 0)?, Tensor::cat(&g_v, 0)?);
        let g_a = add_to(add_to(back(Name::Q, &g_q)?, &back(Name::K, &g_k)?)?, &back(Name::V, &g_v)?)?;
        let input = add_to(rms_backward(x, &self.norm1, self.eps, &g_a)?, &g_h)?;
        Ok(Gradients { input, attn_out: g_h })
    }
}

#[cfg(test)]
pub(crate) mod tests;
