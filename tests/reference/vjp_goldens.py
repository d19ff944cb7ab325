"""Makes tests/golden/block_vjp.json: a small decoder block, its output and gradients, in PyTorch float64.

    python vjp_goldens.py

Written from the block's formulas (Qwen2: grouped queries, biases on q, k, v, rotary positions, SwiGLU), with
PyTorch's autograd for the gradients. Two samples of 5 and 3 tokens are packed.
"""

import json
from pathlib import Path

import torch

torch.manual_seed(5)
torch.set_default_dtype(torch.float64)
H, HEADS, KV, D, INNER, EPS, THETA, SPANS = 12, 4, 2, 4, 10, 1e-6, 10000.0, [5, 3]


def rms(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def rope(x):
    n = x.shape[1]
    freq = THETA ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(n).double(), freq)
    angle = torch.cat([angle, angle], -1)
    turned = torch.cat([-x[..., D // 2:], x[..., : D // 2]], -1)
    return x * angle.cos() + turned * angle.sin()


def block(x, w):
    outs, attns = [], []
    for part in x.split(SPANS):
        n = part.shape[0]
        a = rms(part, w["norm1"])
        heads = lambda name, count: (a @ w[name].T + w[name + "_bias"]).view(n, count, D).transpose(0, 1)
        q, k, v = rope(heads("q", HEADS)), rope(heads("k", KV)), heads("v", KV)
        k, v = (t.repeat_interleave(HEADS // KV, 0) for t in (k, v))
        mask = torch.full((n, n), float("-inf")).triu(1)
        p = torch.softmax(q @ k.transpose(1, 2) / D**0.5 + mask, -1)
        attn = (p @ v).transpose(0, 1).reshape(n, HEADS * D) @ w["o"].T
        attn.retain_grad()
        h = part + attn
        m = rms(h, w["norm2"])
        outs.append(h + (torch.nn.functional.silu(m @ w["gate"].T) * (m @ w["up"].T)) @ w["down"].T)
        attns.append(attn)
    return torch.cat(outs), attns


shapes = {"norm1": [H], "norm2": [H], "q": [HEADS * D, H], "k": [KV * D, H], "v": [KV * D, H], "o": [H, HEADS * D],
          "gate": [INNER, H], "up": [INNER, H], "down": [H, INNER], "q_bias": [HEADS * D], "k_bias": [KV * D], "v_bias": [KV * D]}
# Rounded to f32, so that both sides compute from the same numbers.
w = {name: torch.randn(shape).float().double() for name, shape in shapes.items()}
x = torch.randn(sum(SPANS), H).float().double().requires_grad_()
g = torch.randn(sum(SPANS), H).float().double()
y, attns = block(x, w)
y.backward(g)
flat = lambda t: t.detach().reshape(-1).tolist()
out = {"spans": SPANS, "weights": {k: flat(v) for k, v in w.items()}, "x": flat(x), "g": flat(g), "y": flat(y),
       "gx": flat(x.grad), "g_attn": flat(torch.cat([a.grad for a in attns]))}
(Path(__file__).resolve().parent.parent / "golden/block_vjp.json").write_text(json.dumps(out))
