#!/usr/bin/env python3
"""Writes tests/golden/idefics3.json: what transformers (5.24, float32, eager attention) makes of pictures and a short prompt
with the tiny checkpoint that tests/idefics3.rs writes. Both give every tensor the values that follow from its name, and the
tokenizer has a token for each byte, so that neither need be stored.

    python3 tests/reference/idefics3_goldens.py
"""
import json
import re
from pathlib import Path

import torch
import transformers
from qwen_vl_goldens import fill, picture

SPECIAL = {"<|im_start|>": 298, "<end_of_utterance>": 299, "<image>": 300, "<fake_token_around_image>": 301}
# (width, height), the longer side before tiling: a grid, one that is all but nothing in height, a single tile.
PICTURES = {"square": ((40, 40), 64), "strip": ((200, 2), 64), "tall": ((9, 50), 64), "one_tile": ((40, 25), 32)}


def model():
    text = dict(model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=1, head_dim=32, vocab_size=320, max_position_embeddings=512, rms_norm_eps=1e-5)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    config = transformers.Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, image_token_id=300,
                                         tie_word_embeddings=False)
    model = transformers.Idefics3ForConditionalGeneration(config).float().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.state_dict().items():
            parameter.copy_(fill(key, parameter.shape))
    return model


def ids(text):
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [i for piece in pieces for i in ([SPECIAL[piece]] if piece in SPECIAL else piece.encode())]


def main():
    goldens, net = {}, model()
    for name, ((width, height), edge) in PICTURES.items():
        processor = transformers.Idefics3ImageProcessor(
            size=dict(longest_edge=edge), max_image_size=dict(longest_edge=32), image_mean=[0.5] * 3, image_std=[0.5, 0.25, 0.5])
        inputs = processor(images=[picture(width, height)], return_tensors="pt", return_row_col_info=True)
        grid = dict(rows=inputs.pop("rows"), cols=inputs.pop("cols"))

        class Writer:
            fake_image_token, image_token, global_image_tag, image_seq_len = "<fake_token_around_image>", "<image>", "<global-img>", 4

        shown = transformers.Idefics3Processor.replace_image_token(Writer, grid, 0)
        prompt = ids("User:" + shown + "What?")
        with torch.no_grad():
            embedding = torch.cat(list(net.model.get_image_features(**inputs).pooler_output), 0)
            logits = net(input_ids=torch.tensor([prompt]), **inputs).logits[0, -1]
        number = lambda t: [float(f"{v:.7g}") for v in t.double().flatten().tolist()]
        goldens[name] = dict(ids=prompt, embedding=number(embedding), logprobs=number(torch.log_softmax(logits.double(), -1)))
        print(name, repr(shown)[:90], tuple(embedding.shape))
    path = Path(__file__).parent.parent / "golden" / "idefics3.json"
    path.write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
