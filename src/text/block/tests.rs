use super::*;
use crate::text::ops::rms_scale;
use crate::text::{RopeScaling, Rotary, TextArch};
use candle_core::{D, Var};
use serde_json::Value;

pub(crate) fn tensor(v: &Value, shape: &[usize]) -> Tensor {
    let data: Vec<f32> = v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

pub(crate) fn golden() -> (Value, Block, Vec<Span>) {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/block_vjp.json")).unwrap();
    let (hidden, heads, kv, d, inner) = (12, 4, 2, 4, 10);
    let rotary = Rotary { base: 10000.0, scaling: RopeScaling::None };
    let config = TextConfig {
        arch: TextArch::named("qwen2").unwrap(),
        hidden_size: hidden,
        intermediate_size: inner,
        num_layers: 1,
        num_heads: heads,
        num_kv_heads: kv,
        head_dim: d,
        vocab_size: 1,
        context_length: 8,
        rms_norm_eps: 1e-6,
        attention_scale: 0.5,
        rotary,
        local_rotary: rotary,
        windows: vec![None],
        rope_sections: [0; 3],
        deepstack_layers: 0,
    };
    let w = &golden["weights"];
    let linear = |name: &str, out: usize, inp: usize| {
        let bias = w.get(format!("{name}_bias")).map(|b| tensor(b, &[out]));
        Linear { weight: tensor(&w[name], &[out, inp]), bias }
    };
    let block = Block {
        norm1: tensor(&w["norm1"], &[hidden]),
        norm2: tensor(&w["norm2"], &[hidden]),
        linears: [
            linear("q", heads * d, hidden),
            linear("k", kv * d, hidden),
            linear("v", kv * d, hidden),
            linear("o", hidden, heads * d),
            linear("gate", inner, hidden),
            linear("up", inner, hidden),
            linear("down", hidden, inner),
        ],
        post_norms: None,
        attention: Attention {
            rope: Rope::new(&config, &rotary, None, 8, &Device::Cpu).unwrap(),
            q_norm: None,
            k_norm: None,
            eps: 1e-6,
            kv_heads: kv,
            repeats: heads / kv,
            head_dim: d,
            scale: 0.5,
            window: None,
        },
        activation: Activation::Silu,
        eps: 1e-6,
    };
    (golden, block, vec![Span::new(0, 5), Span::new(5, 3)])
}

fn close(got: &Tensor, want: &Tensor, what: &str) {
    let norm = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let difference = norm((got - want).unwrap()) / norm(want.clone());
    // f32 against f64 through about ten roundings a value: a few 1e-7; a wrong term is 1e-2 and more.
    assert!(difference < 3e-6, "{what}: {difference}");
}

/// Forward pass and gradients are those of PyTorch in float64 (tests/reference/vjp_goldens.py).
#[test]
fn matches_pytorch() {
    let (golden, block, spans) = golden();
    let of = |key: &str| tensor(&golden[key], &[8, 12]);
    close(&block.forward(&of("x"), &spans).unwrap(), &of("y"), "output");
    let back = block.backward(&of("x"), &spans, &of("g")).unwrap();
    close(&back.input, &of("gx"), "gradient at the input");
    // The residual path's part is in the gradient at o_proj's output too: it is the gradient at h.
    close(&back.attn_out, &of("g_attn"), "gradient at o_proj");
}

/// The same gradient from candle's autograd over plain operations.
#[test]
fn matches_autograd() {
    let (golden, block, spans) = golden();
    let of = |key: &str| tensor(&golden[key], &[8, 12]);
    let x = Var::from_tensor(&of("x")).unwrap();
    let rms = |x: &Tensor, w: &Tensor| x.broadcast_mul(&rms_scale(x, 1e-6).unwrap()).unwrap().broadcast_mul(w).unwrap();
    let mut parts = Vec::new();
    for span in &spans {
        let n = span.len;
        let x = x.as_tensor().narrow(0, span.start, n).unwrap();
        let a = rms(&x, &block.norm1);
        // Operations of candle's own: ours keep no graph.
        let run = |name: LinearName, x: &Tensor| {
            let Linear { weight, bias } = block.linear(name);
            let y = x.matmul(&weight.t().unwrap()).unwrap();
            bias.as_ref().map_or(y.clone(), |bias| y.broadcast_add(bias).unwrap())
        };
        let heads = |name: LinearName| block.attention.split(&run(name, &a)).unwrap();
        let turn = |x: Tensor| {
            let angles: Vec<f32> = (0..2 * n).map(|i| (i / 2) as f32 * [1.0, 0.01][i % 2]).collect();
            let angles = Tensor::from_vec(angles, (n, 2), &Device::Cpu).unwrap();
            let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
            let half = |at: usize| x.narrow(D::Minus1, at, 2).unwrap();
            let times = |x: Tensor, by: &Tensor| x.broadcast_mul(by).unwrap();
            let first = (times(half(0), &cos) - times(half(2), &sin)).unwrap();
            let second = (times(half(2), &cos) + times(half(0), &sin)).unwrap();
            Tensor::cat(&[first, second], D::Minus1).unwrap()
        };
        let q = turn(heads(LinearName::Q));
        let twice = |t: Tensor| {
            let (kv, n, d) = t.dims3().unwrap();
            let t = t.unsqueeze(1).unwrap().broadcast_as((kv, 2, n, d)).unwrap();
            t.contiguous().unwrap().reshape((2 * kv, n, d)).unwrap()
        };
        let k = twice(turn(heads(LinearName::K)));
        let v = twice(heads(LinearName::V));
        let mask: Vec<f32> = (0..n * n).map(|i| if i % n <= i / n { 0.0 } else { -1e30 }).collect();
        let mask = Tensor::from_vec(mask, (1, n, n), &Device::Cpu).unwrap();
        let s = (q.matmul(&k.t().unwrap()).unwrap() * 0.5).unwrap().broadcast_add(&mask).unwrap();
        let e = s.exp().unwrap();
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1).unwrap()).unwrap();
        let o = block.attention.join(&p.matmul(&v).unwrap()).unwrap();
        let h = (x + run(LinearName::O, &o)).unwrap();
        let m = rms(&h, &block.norm2);
        let gate = run(LinearName::Gate, &m).silu().unwrap();
        let inner = (gate * run(LinearName::Up, &m)).unwrap();
        parts.push((h + run(LinearName::Down, &inner)).unwrap());
    }
    let y = Tensor::cat(&parts, 0).unwrap();
    let loss = (y * of("g")).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let back = block.backward(&of("x"), &spans, &of("g")).unwrap();
    close(&back.input, grads.get(&x).unwrap(), "gradient at the input");
}
