"""How far W4A8 losses and statistics move when nothing but the order of summation changes.

    python w4a8_order.py ORACLE/tiny-onevision [distort | awq]

Two runs of the same arithmetic in torch float32 on the oracle's batch, with its scales: one with sums as torch makes
them, one with every matrix product and mean in float64, rounded to float32 at the end. Whatever lies between the two
is inside what float32 leaves open. Prints the relative difference of each group's loss (all 20 candidates) and of
x_max, block by block. `distort` sends both streams through the quantised blocks before; `awq` takes AWQ's loss (squared
errors, all tokens alike) instead of MBQ's.
"""
import json, sys, torch
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

root, distort, awq = sys.argv[1], "distort" in sys.argv, "awq" in sys.argv
run = f"{root}/runs/{'awq' if awq else 'mbq'}-{'distort-' if distort else ''}w4a8"
cfg = json.load(open(f"{root}/model/config.json"))["text_config"]
W = load_file(f"{root}/model/model.safetensors")
batch, scales = load_file(f"{root}/runs/batch.safetensors"), load_file(f"{run}/scales.safetensors")
H, KV, C = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["hidden_size"]
D, EPS, THETA = C // H, cfg.get("rms_norm_eps", 1e-6), cfg.get("rope_theta", 1e4)
if "llava" in root.split("/")[-1]:
    EPS = cfg.get("rms_norm_eps", 1e-6)
attention = batch["attention_mask"].bool()
vision, caption = batch["vision_mask"].bool(), batch["caption_mask"].bool()
B, N = attention.shape
mask = torch.where(torch.tril(torch.ones(N, N)).bool()[None] & attention[:, None, :], 0.0, -3.4e38)[:, None]
freq = 1.0 / (THETA ** (torch.arange(0, D, 2).float() / D))
angle = torch.outer(torch.arange(N).float(), freq).repeat(1, 2)[None]
COS, SIN = angle.cos(), angle.sin()

def symmetric(t, top):
    step = t.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
    return torch.round(t / step).clamp(-top, top) * step

class Order:
    """`double`: sums in float64."""
    def __init__(self, double): self.double = double
    def mm(self, a, b):
        return (a.double() @ b.double()).float() if self.double else a @ b
    def linear(self, x, w, b):
        y = self.mm(x, w.T)
        return y if b is None else y + b
    def norm(self, x, w):
        var = x.double().pow(2).mean(-1, keepdim=True).float() if self.double else x.pow(2).mean(-1, keepdim=True)
        return w * (x * torch.rsqrt(var + EPS))
    def x_max(self, x):
        x = x.abs().reshape(-1, x.shape[-1])
        return x.double().mean(0).float() if self.double else x.mean(0)
    def attend(self, q, k, v):
        split = lambda t: t.view(B, N, -1, D).transpose(1, 2)
        q, k, v = split(q), split(k), split(v)
        q, k = apply_rotary_pos_emb(q, k, COS, SIN)
        k, v = (t.repeat_interleave(H // KV, 1) for t in (k, v))
        p = torch.softmax(self.mm(q, k.transpose(2, 3)) / D**0.5 + mask, -1)
        return self.mm(p, v).transpose(1, 2).reshape(B, N, -1)

NAMES = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
             gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
GROUPS = dict(input_layernorm=("qkv", "attn_in", "attn_out"), v_proj=("o", "o_in", "attn_out"),
              post_attention_layernorm=(("gate", "up"), "mlp_in", "mlp_out"), up_proj=(("down",), "down_in", "mlp_out"))

def block(layer):
    at = f"language_model.model.layers.{layer}."
    w = {n: (W[at + p + ".weight"].float(), W.get(at + p + ".bias")) for n, p in NAMES.items()}
    return w | {"n1": W[at + "input_layernorm.weight"], "n2": W[at + "post_attention_layernorm.weight"]}

def trace(o, w, x, quant=lambda t: t):
    lin = lambda n, x: o.linear(quant(x), *w[n])
    t = {"attn_in": o.norm(x, w["n1"])}
    t["o_in"] = o.attend(*(lin(n, t["attn_in"]) for n in "qkv"))
    t["attn_out"] = lin("o", t["o_in"])
    h = x + t["attn_out"]
    t["mlp_in"] = o.norm(h, w["n2"])
    t["down_in"] = torch.nn.functional.silu(lin("gate", t["mlp_in"])) * lin("up", t["mlp_in"])
    t["mlp_out"] = lin("down", t["down_in"])
    t["y"] = h + t["mlp_out"]
    return t

def fold(w, group, s):
    w = dict(w)
    for n in GROUPS[group][0]:
        w[n] = (w[n][0] * s, w[n][1])
    norm = {"input_layernorm": "n1", "post_attention_layernorm": "n2"}.get(group)
    if norm:
        w[norm] = w[norm] / s
    else:
        n = group[0] if group == "v_proj" else "up"
        w[n] = (w[n][0] / s[:, None], None if w[n][1] is None else w[n][1] / s)
    return w

act = lambda t: symmetric(t, 127)
quantised = lambda w: {n: ((symmetric(v[0], 7), v[1]) if isinstance(v, tuple) else v) for n, v in w.items()}

def losses(o, w, group, t, seen, ratio):
    linears, x_name, y_name = GROUPS[group]
    x, y = seen[x_name], t[y_name]
    x_max = o.x_max(x)
    out = []
    for i in range(20):
        s = x_max.pow(i / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        q = {n: (symmetric(w[n][0] * s, 7), w[n][1]) for n in linears}
        xs = act(x / s)
        l = lambda n: o.linear(xs, *q[n])
        if group == "input_layernorm":
            got = o.linear(o.attend(l("q"), l("k"), l("v")), *w["o"])
        elif group == "post_attention_layernorm":
            got = o.linear(torch.nn.functional.silu(l("gate")) * l("up"), *w["down"])
        else:
            got = l(linears[0])
        if awq:
            out.append((y - got).double().pow(2).mean().item())
            continue
        d = (y - got).abs()
        total = d[caption].double().sum() + ratio * d[vision].double().sum()
        out.append((total / ((caption.sum() + vision.sum()) * C)).item())
    return out, x_max

report = json.load(open(f"{run}/report.json"))["blocks"]
orders = [Order(False), Order(True)]
x = [batch["inputs_embeds"].float()] * 2
xq = list(x)
moved, against = [], []
with torch.no_grad():
    for layer, theirs in enumerate(report):
        w = block(layer)
        full = [trace(o, w, x[i]) for i, o in enumerate(orders)]
        scaled = w
        for g in theirs["groups"]:
            group = g["prev"].split(".")[-1]
            r = None if awq else theirs["ratio"]["attn" if group in ("input_layernorm", "v_proj") else "mlp"]
            seen = [trace(o, quantised(scaled), xq[i], act) for i, o in enumerate(orders)] if distort else full
            (a, xa), (b, xb) = (losses(o, w, group, full[i], seen[i], r) for i, o in enumerate(orders))
            d = [abs(p - q) / q for p, q in zip(a, b)]
            e = [abs(p - q) / q for p, q in zip(a, g["losses"])]
            moved += d; against += e
            dx = ((xa - xb).abs() / xb.clamp(min=1e-30)).max().item()
            print(f"{layer} {group}: losses {max(d):.1e}, x_max {dx:.1e}; this script to the oracle {max(e):.1e}")
            scaled = fold(scaled, group, scales[g["prev"]].float().flatten())
        if distort:
            xq = [trace(o, quantised(scaled), xq[i], act)["y"] for i, o in enumerate(orders)]
        x = [t["y"] for t in full]
for name, d in (("between the two orders", moved), ("to the oracle", against)):
    d = sorted(d)
    print(f"{name}: {len(d)} losses, median {d[len(d) // 2]:.1e}, max {d[-1]:.1e}")
