#!/usr/bin/env python3
"""Writes tests/golden/qwen_vl.json: what transformers (5.24, float32, eager attention) makes of a picture and a short
prompt with the three tiny checkpoints that tests/qwen_vl.rs writes. Both give every tensor the values that follow from its
name, so that the checkpoints themselves need not be stored.

    python3 tests/reference/qwen_vl_goldens.py
"""
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

MASK = (1 << 64) - 1
START, END, PAD, VIDEO = 300, 301, 302, 303
# "hell", the picture, " t".
WORDS = (259, 258)


def values(n, seed):
    """As `values` of tests/tiny/mod.rs."""
    state = (seed * 0x9E3779B97F4A7C15 & MASK) | 1
    out = []
    for _ in range(n):
        state ^= state << 13 & MASK
        state ^= state >> 7
        state ^= state << 17 & MASK
        out.append(((state >> 40) % 2001 - 1000) / 1000)
    return torch.tensor(out, dtype=torch.float32).bfloat16().float()


def fill(name, shape):
    """A gain is around 1, everything else small."""
    seed = 7
    for byte in name.encode():
        seed = (seed * 31 + byte) & MASK
    v = values(int(np.prod(shape)), seed)
    gain = name.endswith("weight") and any(part in name for part in ["norm", "ln_q"])
    return ((v * 0.1 + 1.0) if gain else v * 0.15).bfloat16().float().reshape(shape)


def picture(width, height):
    """As `picture` of tests/common/compared.rs."""
    return Image.fromarray(np.array([[[(7 * x + 13 * y + 50 * c + x * y // 9) % 256 for c in range(3)] for x in range(width)]
                                     for y in range(height)], dtype=np.uint8))


TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=320, max_position_embeddings=512, rms_norm_eps=1e-6)
OUTER = dict(image_token_id=PAD, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def rope(**more):
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6], **more)


def models():
    t = transformers
    tower = dict(hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=14)
    yield "qwen2_vl", t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(
        text_config=TEXT | dict(rope_parameters=rope()), tie_word_embeddings=False, **OUTER,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=14)))
    yield "qwen2_5_vl", t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(
        text_config=TEXT | dict(rope_parameters=rope()), tie_word_embeddings=False, **OUTER,
        vision_config=tower | dict(depth=4, fullatt_block_indexes=[1, 3], window_size=112)))
    yield "qwen3_vl", t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(
        text_config=TEXT | dict(head_dim=32, rope_parameters=rope(mrope_interleaved=True)),
        tie_word_embeddings=False, **OUTER,
        vision_config=tower | dict(depth=3, patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0, 2])))


def main():
    goldens = {}
    for name, model in models():
        model = model.float().eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            for key, parameter in model.state_dict().items():
                parameter.copy_(fill(key, parameter.shape))
            patch = model.config.vision_config.patch_size
            processor = transformers.Qwen2VLImageProcessor(
                patch_size=patch, merge_size=2, size=dict(shortest_edge=3136, longest_edge=1 << 20),
                image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.25, 0.5])
            inputs = processor(images=picture(12 * patch, 8 * patch), return_tensors="pt")
            tokens = int(inputs["image_grid_thw"].prod()) // 4
            features = model.model.get_image_features(**inputs)
            embedding = torch.cat(list(features.pooler_output), 0)
            deep = getattr(features, "deepstack_features", None)
            deep = [layer if torch.is_tensor(layer) else torch.cat(list(layer), 0) for layer in deep or []]
            embedding = torch.cat([embedding, *deep], 1)
            ids = torch.tensor([[WORDS[0], START] + [PAD] * tokens + [END, WORDS[1]]])
            logits = model(input_ids=ids, mm_token_type_ids=(ids == PAD).int(), **inputs).logits[0, -1]
        number = lambda t: [float(f"{v:.7g}") for v in t.double().flatten().tolist()]
        logprobs = torch.log_softmax(logits.double(), -1)
        goldens[name] = dict(tokens=tokens, embedding=number(embedding), logprobs=number(logprobs))
        print(name, tuple(embedding.shape), "entropy", float(-(logprobs.exp() * logprobs).sum()))
    path = Path(__file__).parent.parent / "golden" / "qwen_vl.json"
    path.write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
