//! The decoder block that every supported text model shares: `h = x + Attn(norm1 x); y = h + MLP(norm2 h)`, the parts
//! normed once more before they are added where the architecture has it so, and its vector-Jacobian product by hand
//! (candle's autograd needs 2.5 times the time and twice the memory).
//!
//! Samples are packed: a matrix `[tokens, hidden]` holds several, and [`Span`] says where each begins and ends.
use super::Error;
use super::arch::Activation;
use super::attention::Attention;
use super::config::TextConfig;
use super::ops::{activate, activate_backward, add, add_row, add_to, rms_backward, rms_norm};
use super::rope::Rope;
use super::sample::Span;
use super::tensors::{Weights, in_block};
use candle_core::{Device, Result, Tensor};

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
pub enum LinearName {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl LinearName {
    pub const ALL: [LinearName; 7] = [
        LinearName::Q,
        LinearName::K,
        LinearName::V,
        LinearName::O,
        LinearName::Gate,
        LinearName::Up,
        LinearName::Down,
    ];
}

/// A block's weights in f32.
#[derive(Debug, Clone)]
pub struct Block {
    pub norm1: Tensor,
    pub norm2: Tensor,
    /// Gains of the norms between the attention, or the MLP, and the stream.
    pub post_norms: Option<[Tensor; 2]>,
    pub linears: [Linear; 7],
    pub attention: Attention,
    pub activation: Activation,
    pub(super) eps: f64,
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
    /// x + attn_out, or x + norm(attn_out).
    pub h: Tensor,
    /// norm2(h), the input of gate and up.
    pub mlp_in: Tensor,
    /// f(gate) * up, the input of down.
    pub down_in: Tensor,
    /// The output of down.
    pub mlp_out: Tensor,
    /// With [`Block::trace_all`].
    pub made: Option<Made>,
}

/// What the way back needs beside x and the output of o: the outputs of the linears named so.
#[derive(Debug, Clone)]
pub struct Made {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
}

/// Gradients of the loss, all `[tokens, hidden]`.
pub struct Gradients {
    /// At the block's input.
    pub input: Tensor,
    /// At the output of o.
    pub attn_out: Tensor,
    /// At the output of down.
    pub mlp_out: Tensor,
}

impl Block {
    /// Reads block `layer`, whose positions turn by `rope`.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or holds NaN or infinity; the message names it.
    pub fn load(
        weights: &dyn Weights,
        config: &TextConfig,
        layer: usize,
        rope: &Rope,
        device: &Device,
    ) -> std::result::Result<Self, Error> {
        let arch = config.arch;
        let read = |part: &str, shape: &[usize]| weights.tensor(&in_block(layer, part), shape, device);
        let linear = |name: LinearName| -> std::result::Result<Linear, Error> {
            let (shape, bias) = (config.shape(name), format!("{}.bias", name.part()));
            let has_bias = arch.biased.contains(&name)
                || arch.may_be_biased.contains(&name) && weights.contains(&in_block(layer, &bias));
            let weight = read(&format!("{}.weight", name.part()), &shape)?;
            Ok(Linear { weight, bias: has_bias.then(|| read(&bias, &shape[..1])).transpose()? })
        };
        let [q, k, v, o, gate, up, down] = LinearName::ALL.map(linear);
        let norm = |part: &str, width: usize| read(&format!("{part}.weight"), &[width]);
        let head_norm = |part: &str| arch.qk_norms.then(|| norm(part, config.head_dim)).transpose();
        let hidden = config.hidden_size;
        let post_norms = match arch.post_norms {
            true => Some([norm("post_attention_norm", hidden)?, norm("post_ffw_norm", hidden)?]),
            false => None,
        };
        Ok(Block {
            norm1: norm("attn_norm", hidden)?,
            norm2: norm("ffn_norm", hidden)?,
            post_norms,
            linears: [q?, k?, v?, o?, gate?, up?, down?],
            attention: Attention {
                rope: rope.clone(),
                q_norm: head_norm("attn_q_norm")?,
                k_norm: head_norm("attn_k_norm")?,
                eps: config.rms_norm_eps,
                kv_heads: config.num_kv_heads,
                repeats: config.num_heads / config.num_kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_scale,
                window: config.windows[layer],
            },
            activation: arch.activation,
            eps: config.rms_norm_eps,
        })
    }

    pub fn linear(&self, name: LinearName) -> &Linear {
        &self.linears[name as usize]
    }

    pub fn linear_mut(&mut self, name: LinearName) -> &mut Linear {
        &mut self.linears[name as usize]
    }

    /// Query heads per value head, and a head's width.
    pub fn head_shape(&self) -> (usize, usize) {
        (self.attention.repeats, self.attention.head_dim)
    }

    pub fn attn_norm(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.norm1, self.eps)
    }

    pub fn mlp_norm(&self, h: &Tensor) -> Result<Tensor> {
        rms_norm(h, &self.norm2, self.eps)
    }

    /// `f(gate) * up`. `gate` may be overwritten.
    pub fn activate(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        activate(gate, up, self.activation)
    }

    /// The stream behind the attention: x, and the output of o, normed where the architecture has it so.
    pub fn after_attention(&self, x: &Tensor, attn_out: &Tensor) -> Result<Tensor> {
        match &self.post_norms {
            Some([gain, _]) => add_to(rms_norm(attn_out, gain, self.eps)?, x),
            None => add(x, attn_out),
        }
    }

    /// The stream behind the MLP, the block's output: h, and the output of down, normed likewise.
    pub fn after_mlp(&self, h: &Tensor, mlp_out: &Tensor) -> Result<Tensor> {
        match &self.post_norms {
            Some([_, gain]) => add_to(rms_norm(mlp_out, gain, self.eps)?, h),
            None => add(h, mlp_out),
        }
    }

    /// The block's output.
    pub fn output(&self, trace: &Trace) -> Result<Tensor> {
        self.after_mlp(&trace.h, &trace.mlp_out)
    }

    /// The heads' outputs from packed q, k, v as their linears make them.
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
        self.attention.forward(q, keys, spans, rows)
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
        let run = |name: LinearName, x: &Tensor| self.linear(name).forward(x);
        let attn_in = self.attn_norm(x)?;
        let a = input(&attn_in)?;
        let (q, k, v) = (run(LinearName::Q, &a)?, run(LinearName::K, &a)?, run(LinearName::V, &a)?);
        let o_in = self.attend(&q, &k, &v, spans)?;
        let attn_out = run(LinearName::O, &input(&o_in)?)?;
        let h = self.after_attention(x, &attn_out)?;
        let mlp_in = self.mlp_norm(&h)?;
        let m = input(&mlp_in)?;
        let (gate, up) = (run(LinearName::Gate, &m)?, run(LinearName::Up, &m)?);
        let made = if all { Some(Made { q, k, v, gate: gate.copy()?, up: up.clone() }) } else { None };
        let down_in = self.activate(gate, &up)?;
        let mlp_out = run(LinearName::Down, &input(&down_in)?)?;
        Ok(Trace { attn_in, o_in, attn_out, h, mlp_in, down_in, mlp_out, made })
    }

    /// The block's output.
    pub fn forward(&self, x: &Tensor, spans: &[Span]) -> Result<Tensor> {
        self.output(&self.trace(x, spans, &|x| Ok(x.clone()))?)
    }

    /// The gradient at the input from the gradient `g` at the output; the forward pass is made again from `x`.
    pub fn backward(&self, x: &Tensor, spans: &[Span], g: &Tensor) -> Result<Gradients> {
        let run = |name: LinearName, x: &Tensor| self.linear(name).forward(x);
        // Forward, up to the MLP's inner product.
        let a = self.attn_norm(x)?;
        let (q, k, v) = (run(LinearName::Q, &a)?, run(LinearName::K, &a)?, run(LinearName::V, &a)?);
        let attn_out = run(LinearName::O, &self.attend(&q, &k, &v, spans)?)?;
        let m = self.mlp_norm(&self.after_attention(x, &attn_out)?)?;
        let (gate, up) = (run(LinearName::Gate, &m)?, run(LinearName::Up, &m)?);
        self.backward_from(x, &attn_out, &Made { q, k, v, gate, up }, spans, g)
    }

    /// The same where the forward pass was kept.
    pub fn backward_from(
        &self,
        x: &Tensor,
        attn_out: &Tensor,
        made: &Made,
        spans: &[Span],
        g: &Tensor,
    ) -> Result<Gradients> {
        let back = |name: LinearName, g: &Tensor| self.linear(name).backward(g);
        let Made { q, k, v, gate, up } = made;
        let h = self.after_attention(x, attn_out)?;
        // y = h + down(f(gate) * up), or h + norm(down(…)).
        let mlp_out = match &self.post_norms {
            Some([_, gain]) => {
                let out = self.linear(LinearName::Down).forward(&self.activate(gate.copy()?, up)?)?;
                rms_backward(&out, gain, self.eps, g)?
            }
            None => g.clone(),
        };
        let g_inner = back(LinearName::Down, &mlp_out)?;
        let (g_gate, g_up) = activate_backward(gate, up, &g_inner, self.activation)?;
        let g_m = add_to(back(LinearName::Gate, &g_gate)?, &back(LinearName::Up, &g_up)?)?;
        let g_h = add_to(rms_backward(&h, &self.norm2, self.eps, &g_m)?, g)?;

        // h = x + o(attend(q, k, v)), or x + norm(o(…)).
        let attn_out = match &self.post_norms {
            Some([gain, _]) => rms_backward(attn_out, gain, self.eps, &g_h)?,
            None => g_h.clone(),
        };
        let (g_q, g_k, g_v) = self.attention.backward([q, k, v], spans, &back(LinearName::O, &attn_out)?)?;
        let g_a =
            add_to(add_to(back(LinearName::Q, &g_q)?, &back(LinearName::K, &g_k)?)?, &back(LinearName::V, &g_v)?)?;
        let input = add_to(rms_backward(x, &self.norm1, self.eps, &g_a)?, &g_h)?;
        Ok(Gradients { input, attn_out, mlp_out })
    }
}

#[cfg(test)]
pub(crate) mod tests;
