#!/usr/bin/env python3
"""Writes tests/golden/llava.json: what transformers (5.24, float32, eager attention) makes of pictures padded to a square and a
prompt with the tiny LLaVA 1.5 that tests/llava_original.rs writes. Both give every tensor the values that follow from its
published name.

    python3 tests/reference/llava_goldens.py
"""
import json
from pathlib import Path

import torch
import transformers
from qwen_vl_goldens import fill, picture
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

GOLDEN = Path(__file__).parent.parent / "golden"
# (width, height): an odd number of pixels is missing in the second.
PICTURES = {"wide": (60, 22), "tall": (9, 40)}


def published(name):
    """The name that llava-hf's files have."""
    for new, old in [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                     ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
                     ("model.vision_tower.", "vision_tower.vision_model."),
                     ("model.multi_modal_projector.", "multi_modal_projector.")]:
        if name.startswith(new):
            return old + name[len(new):]
    raise ValueError(name)


def model():
    text = dict(model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=1216, max_position_embeddings=512, rms_norm_eps=1e-5)
    vision = dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                  num_attention_heads=4, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=1200, image_seq_length=4)
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(fill(published(key), parameter.shape))
    return model


def main():
    goldens, net = {}, model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / "sentencepiece")
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                       image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    # As LLaVA's own code and llama.cpp: texts before and behind a picture each for itself.
    before, behind = (tokenizer(text).input_ids for text in ("USER: ", "\nWhat is it? ASSISTANT:"))
    prompt = before + [1200] * 4 + behind[1:]
    for name, (width, height) in PICTURES.items():
        pixels = processor(images=[picture(width, height)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            embedding = torch.cat(list(net.model.get_image_features(pixel_values=pixels).pooler_output), 0)
            logits = net(input_ids=torch.tensor([prompt]), pixel_values=pixels).logits[0, -1]
        number = lambda t: [float(f"{v:.7g}") for v in t.double().flatten().tolist()]
        goldens[name] = dict(ids=prompt, embedding=number(embedding), logprobs=number(torch.log_softmax(logits.double(), -1)))
        print(name, prompt, tuple(embedding.shape))
    (GOLDEN / "llava.json").write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
