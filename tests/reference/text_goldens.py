"""Makes tests/golden/text/*.safetensors: small text models of transformers in float64, a file per architecture row.

    python text_goldens.py            (transformers 5, torch, safetensors)

Each file has a model's weights as llama.cpp's converter would write them (GGUF names; Llama's q and k reordered, Gemma's
gains with their 1 added, Llama 3's factors as a tensor), its GGUF metadata, samples, and what transformers makes of them:
what enters each block, what leaves the last, and the gradients of sum(output * g) at blocks' inputs and at the outputs
of o_proj and down_proj. Norms, cosines and sines are float32 within transformers whatever the model's type.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (Gemma3TextConfig, Gemma3TextModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config,
                          Qwen2Model, Qwen2VLTextConfig, Qwen3Config, Qwen3Model, Qwen3VLTextConfig, Qwen3VLTextModel)
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

OUT = Path(__file__).resolve().parent.parent / "golden/text"
HIDDEN, INNER, HEADS, KV, DIM = 16, 24, 4, 2, 16
SIZES = dict(hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=DIM,
             vocab_size=8, max_position_embeddings=64, pad_token_id=None, attn_implementation="sdpa")
LINEARS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output":
           "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {**NORMS, "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}


def neighbours(weight):
    """As llama.cpp's converter reorders the rows of Llama's q and k."""
    return weight.reshape(-1, 2, DIM // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def picture_positions(before, height, width, after):
    """Time, height, width of a text, a picture and a text, as Qwen-VL counts them."""
    rows = [[i] * 3 for i in range(before)]
    rows += [[before, before + i // width, before + i % width] for i in range(height * width)]
    start = before + max(height, width)
    return torch.tensor(rows + [[start + i] * 3 for i in range(after)])


def make(name, arch, model, keys, samples, norms=NORMS, gain=0.0, reorder=False, tensors=None):
    """`samples`: dicts with `tokens` and perhaps `positions`, `runs` (of which transformers gets masks) and `deepstack`."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32)
    model = model.double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.copy_((0.3 * random(*p.shape) + (0 if gain else 1)).double())
            elif key.endswith("bias"):
                p.copy_((0.5 * random(*p.shape)).double())
            else:
                # q and k so large that tokens do not attend to all others alike.
                scale = 0.8 if "q_proj" in key or "k_proj" in key else 0.3
                p.copy_((scale * random(*p.shape)).double())
    out = dict(tensors or {})
    layers = model.layers
    for i, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for part, path in norms.items():
            if path in modules:
                out[f"blk.{i}.{part}.weight"] = modules[path].weight.detach() + gain
        for part, path in LINEARS.items():
            for kind in ("weight", "bias"):
                t = getattr(modules[path], kind)
                if t is not None:
                    move = neighbours if reorder and part in ("attn_q", "attn_k") else lambda t: t
                    out[f"blk.{i}.{part}.{kind}"] = move(t.detach())
    kept = {}

    def keep(key):
        def hook(_, args, kwargs, output=None):
            t = output if output is not None else args[0] if args else kwargs["hidden_states"]
            t = t[0] if isinstance(t, tuple) else t
            if t.requires_grad:
                t.retain_grad()
            kept[key] = t
        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(keep(f"in.{i}"), with_kwargs=True)
        for key, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            module.register_forward_hook(lambda m, a, o, key=f"{key}.{i}": keep(key)(m, a, {}, o))
    layers[-1].register_forward_hook(lambda m, a, o: keep("out")(m, a, {}, o))
    facts = []
    for s, sample in enumerate(samples):
        n = sample["tokens"]
        hidden = model.config.hidden_size
        x = random(n, hidden).double().requires_grad_()
        g = random(n, hidden).double()
        kwargs = {}
        fact = {"tokens": n, "runs": sample.get("runs", [])}
        if "positions" in sample:
            out[f"{s}.positions"] = sample["positions"].to(torch.uint32)
            kwargs["position_ids"] = sample["positions"].T[:, None]
        if "runs" in sample:
            ids = torch.full((1, n), -1)
            for k, (start, end) in enumerate(sample["runs"]):
                ids[0, start:end] = k
            kwargs["attention_mask"] = create_masks_for_vision_model(
                config=model.config, inputs_embeds=x[None], attention_mask=None, cache=None,
                position_ids=torch.arange(n)[None], block_sequence_ids=ids)
        if "deepstack" in sample:
            start, end, blocks = sample["deepstack"]
            mask = torch.zeros(1, n, dtype=torch.bool)
            mask[0, start:end] = True
            features = [random(end - start, hidden).double() for _ in range(blocks)]
            kwargs.update(visual_pos_masks=mask, deepstack_visual_embeds=features)
            for k, f in enumerate(features):
                whole = torch.zeros(n, hidden).double()
                whole[start:end] = f
                out[f"{s}.deepstack.{k}"] = whole
            fact["deepstack"] = blocks
        model(inputs_embeds=x[None], use_cache=False, **kwargs)
        (kept["out"] * g).sum().backward()
        out[f"{s}.g"] = g
        for key, t in kept.items():
            out[f"{s}.{key}"] = t.detach()[0]
            if key != "out":
                out[f"{s}.grad.{key}"] = t.grad[0]
        facts.append(fact)
    keys = {"block_count": len(layers), "embedding_length": hidden, "feed_forward_length": INNER, "vocab_size": 8,
            "context_length": 64, "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.key_length": DIM,
            "attention.value_length": DIM, "attention.layer_norm_rms_epsilon": model.config.rms_norm_eps, **keys}
    metadata = {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in keys.items()}}
    out = {k: (t if t.dtype == torch.uint32 else t.float()).contiguous().clone() for k, t in out.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.safetensors"
    save_file(out, path, {"gguf": json.dumps(metadata), "samples": json.dumps(facts)})
    print(path.name, path.stat().st_size)


def rope(base, **scaling):
    return {"rope_theta": base, "rope_type": "default", **scaling}


def llama3_factors(factor, low, high, original, base):
    """What llama.cpp's converter writes as rope_freqs.weight for `rope_type: llama3`."""
    out = []
    for i in range(0, DIM, 2):
        wavelength = 2 * math.pi * base ** (i / DIM)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    assert 1 < len(set(out)) and any(1 < v < factor for v in out)
    return torch.tensor(out)


torch.manual_seed(0)
plain = [dict(tokens=9), dict(tokens=5)]
picture = [dict(tokens=13, positions=picture_positions(3, 2, 3, 4)), dict(tokens=4)]

make("qwen2", "qwen2", Qwen2Model(Qwen2Config(**SIZES, num_hidden_layers=2, rope_parameters=rope(1e6))),
     {"rope.freq_base": 1e6}, plain)
make("qwen2vl", "qwen2vl",
     # Its heads divide the hidden size, whatever head_dim says.
     Qwen2VLTextModel(Qwen2VLTextConfig(**SIZES | {"hidden_size": HEADS * DIM}, num_hidden_layers=2, rope_parameters=rope(1e4, mrope_section=[3, 3, 2]))),
     {"rope.freq_base": 1e4, "rope.dimension_sections": [3, 3, 2, 0]}, picture)
make("qwen3", "qwen3", Qwen3Model(Qwen3Config(**SIZES, num_hidden_layers=2, rope_parameters=rope(1e4))),
     {"rope.freq_base": 1e4}, plain)
yarn = rope(100.0) | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
make("qwen3-yarn", "qwen3", Qwen3Model(Qwen3Config(**SIZES, num_hidden_layers=2, rope_parameters=yarn)),
     {"rope.freq_base": 100.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
      "rope.scaling.original_context_length": 16}, plain)
make("qwen3vl", "qwen3vl",
     Qwen3VLTextModel(Qwen3VLTextConfig(**SIZES, num_hidden_layers=3, rope_parameters=rope(1e4, mrope_section=[4, 2, 2]))),
     {"rope.freq_base": 1e4, "rope.dimension_sections": [4, 2, 2, 0], "n_deepstack_layers": 2},
     [dict(picture[0], deepstack=(3, 9, 2)), picture[1]])
make("llama", "llama", LlamaModel(LlamaConfig(**SIZES, num_hidden_layers=2, attention_bias=True, mlp_bias=True)),
     {"rope.freq_base": 1e4, "rope.dimension_count": DIM}, plain, reorder=True)
llama3 = rope(1e4) | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}
make("llama3", "llama", LlamaModel(LlamaConfig(**SIZES, num_hidden_layers=2, rope_parameters=llama3)),
     {"rope.freq_base": 1e4}, plain, reorder=True, tensors={"rope_freqs.weight": llama3_factors(8.0, 1.0, 4.0, 64, 1e4)})
make("mistral", "llama", MistralModel(MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=4)),
     {"rope.freq_base": 1e4, "attention.sliding_window": 4}, [dict(tokens=13), dict(tokens=3)], reorder=True)
both = {"full_attention": rope(1e6) | {"rope_type": "linear", "factor": 8.0}, "sliding_attention": rope(1e4)}
make("gemma3", "gemma3",
     Gemma3TextModel(Gemma3TextConfig(**SIZES, num_hidden_layers=7, sliding_window=4, query_pre_attn_scalar=9, rope_parameters=both)),
     {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 4,
      "attention.scale": 1 / 3}, [dict(tokens=14, runs=[[2, 8], [9, 11]]), dict(tokens=5, runs=[])], GEMMA_NORMS, gain=1.0)
