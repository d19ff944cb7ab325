#!/usr/bin/env python3
"""Writes tests/golden/internvl.json: what transformers (5.24, float32, eager attention) makes of a picture and a short
prompt with the tiny checkpoints that tests/internvl.rs writes, and into how many tiles it cuts pictures of several sizes.
Both give every tensor the values that follow from its name, so that the checkpoints themselves need not be stored.
InternLM2's text model is transformers' Llama here, with other names and q, k and v side by side.

    python3 tests/reference/internvl_goldens.py
"""
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from qwen_vl_goldens import fill, picture
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

BEGIN, END, CONTEXT = 300, 301, 302
# "hell", the picture, " t".
WORDS = (259, 258)
SIDE, MAX_TILES = 56, 6
SIZES = [(56, 56), (55, 57), (20, 16), (200, 20), (20, 200), (112, 56), (98, 56), (196, 112), (640, 480), (480, 640), (1000, 999)]


TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=320, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0))
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[SIDE, SIDE],
              patch_size=[14, 14], layer_norm_eps=1e-6, hidden_act="gelu")
SMALL = dict(attention_bias=True, use_qk_norm=False, norm_type="layer_norm")
LARGE = dict(attention_bias=False, use_qk_norm=True, norm_type="rms_norm")


def models():
    for name, text, vision in [("qwen2", dict(model_type="qwen2"), SMALL),
                               ("qwen3", dict(model_type="qwen3", head_dim=32), SMALL),
                               ("internlm2", dict(model_type="llama"), LARGE)]:
        yield name, transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(
            text_config=TEXT | text, vision_config=VISION | vision, image_token_id=CONTEXT, tie_word_embeddings=False))


def tiles(image, original):
    """Pixel values: by the processor, or as OpenGVLab's model cards have it, with Pillow."""
    mean, std = [0.5, 0.5, 0.5], [0.5, 0.25, 0.5]
    if not original:
        processor = transformers.GotOcr2ImageProcessor(size=dict(height=SIDE, width=SIDE), image_mean=mean, image_std=std,
                                                       max_patches=MAX_TILES, crop_to_patches=True)
        return processor(images=image, return_tensors="pt")["pixel_values"]
    (width, height), side = image.size, SIDE
    columns, rows = get_optimal_tiled_canvas((height, width), (side, side), 1, MAX_TILES)
    # Rows first, then columns, as Pillow did before 13 whatever the sizes.
    resize = lambda w, h: image.resize((w, height), Image.BICUBIC).resize((w, h), Image.BICUBIC)
    whole = resize(side * columns, side * rows)
    parts = [whole.crop((side * x, side * y, side * (x + 1), side * (y + 1))) for y in range(rows) for x in range(columns)]
    parts += [resize(side, side)] if len(parts) > 1 else []
    pixels = np.stack([(np.asarray(part) / 255 - mean) / std for part in parts])
    return torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)


def main():
    count = lambda n: n if n == 1 else n + 1
    goldens = dict(tiles=[[w, h, count(int(np.prod(get_optimal_tiled_canvas((h, w), (SIDE, SIDE), 1, MAX_TILES))))] for w, h in SIZES])
    for name, model in models():
        model = model.float().eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            for key, parameter in model.state_dict().items():
                parameter.copy_(fill(key, parameter.shape))
            pixel_values = tiles(picture(100, 60), name == "internlm2")
            features = model.model.get_image_features(pixel_values=pixel_values).pooler_output
            embedding = features.reshape(-1, TEXT["hidden_size"])
            ids = torch.tensor([[WORDS[0], BEGIN] + [CONTEXT] * len(embedding) + [END, WORDS[1]]])
            logits = model(input_ids=ids, pixel_values=pixel_values).logits[0, -1]
        number = lambda t: [float(f"{v:.7g}") for v in t.double().flatten().tolist()]
        logprobs = torch.log_softmax(logits.double(), -1)
        goldens[name] = dict(tokens=len(embedding), embedding=number(embedding), logprobs=number(logprobs))
        print(name, tuple(embedding.shape), "entropy", float(-(logprobs.exp() * logprobs).sum()))
    path = Path(__file__).parent.parent / "golden" / "internvl.json"
    path.write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
