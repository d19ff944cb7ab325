#!/usr/bin/env python3
"""Writes tests/golden/gemma3/: a tokenizer of Gemma's kind, made of the one in tests/golden/sentencepiece, and what transformers
(5.24, float32, eager attention) makes of pictures and short prompts with it and the tiny checkpoint that tests/gemma3.rs
writes, whose tensors have the values that follow from their names.

    python3 tests/reference/gemma3_goldens.py
"""
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from qwen_vl_goldens import MASK, picture, values

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
OUT = GOLDEN / "gemma3"
ROWS = 1280
# (width, height)
PICTURES = {"square": (32, 32), "wide": (90, 20), "tall": (5, 61)}


def tokenizer():
    """Runs of line ends, tabs and spaces are added tokens that merges make before all others; nothing is put in front."""
    json_ = json.loads((GOLDEN / "sentencepiece/tokenizer.json").read_text())
    model = json_["model"]
    runs = {char: [char * n for n in range(1 if char != "▁" else 2, 5)] for char in "\n▁\t"}
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    is_run = lambda text: len(text) > 1 and set(text) == {"▁"}
    for piece in [p for p in model["vocab"] if is_run(p)]:
        model["vocab"][f"<was{model['vocab'].pop(piece)}>"] = len(model["vocab"])
    # Ids close up: what was removed is renamed in its place.
    order = sorted(model["vocab"], key=lambda p: (int(p[4:-1]) if p.startswith("<was") else model["vocab"][p]))
    merges = [[a, b] for a, b in merges if not is_run(a + b)]
    names = [run for of in runs.values() for run in of]
    special = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<pad>"]
    order = [{"<s>": "<bos>", "</s>": "<eos>"}.get(piece, piece) for piece in order] + names + special
    model["vocab"] = {piece: i for i, piece in enumerate(order)}
    made = [[run[:i], run[i:]] for n in (4, 3, 2) for of in runs.values() for run in of if len(run) == n for i in range(1, n)]
    model["merges"] = made + merges
    added = lambda piece, is_special: dict(id=model["vocab"][piece], content=piece, single_word=False, lstrip=False,
                                           rstrip=False, normalized=False, special=is_special)
    json_["added_tokens"] = [added(p, True) for p in ["<unk>", "<bos>", "<eos>"]] + [added(p, False) for p in names]
    json_["added_tokens"] += [added(p, True) for p in special]
    json_["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    json_["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    json_["decoder"]["decoders"].pop()
    single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    json_["post_processor"].update(single=single, pair=single + [{"Sequence": {"id": "B", "type_id": 1}}],
                                   special_tokens={"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}})
    path = OUT / "tokenizer.json"
    path.write_text(json.dumps(json_, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", boi_token="<start_of_image>",
                 eoi_token="<end_of_image>", image_token="<image_soft_token>")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **names), model["vocab"]


def fill(name, shape):
    """Gains of the tower are around 1, those that transformers adds 1 to around 0, everything else small."""
    seed = 7
    for byte in name.encode():
        seed = (seed * 31 + byte) & MASK
    gain = name.endswith("weight") and "norm" in name
    v = values(int(np.prod(shape)), seed) * (0.3 if gain else 0.15)
    return (v + 1.0 if gain and "vision_tower" in name else v).bfloat16().float().reshape(shape)


def network(vocab):
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2,
                head_dim=32, query_pre_attn_scalar=32, vocab_size=ROWS, max_position_embeddings=512, sliding_window=12,
                rope_scaling=dict(rope_type="linear", factor=8.0))
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=32, patch_size=8, vision_use_head=False)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                       boi_token_index=vocab["<start_of_image>"], eoi_token_index=vocab["<end_of_image>"],
                                       image_token_index=vocab["<image_soft_token>"])
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.state_dict().items():
            if not key.startswith("lm_head"):
                # Under the names of published files.
                name = key.replace("model.vision_tower.", "vision_tower.vision_model.").replace(".vision_model.vision_model.", ".vision_model.")
                name = name.replace("model.language_model.", "language_model.model.").replace("model.multi_modal", "multi_modal")
                parameter.copy_(fill(name, parameter.shape))
    return model


def main():
    OUT.mkdir(exist_ok=True)
    text, vocab = tokenizer()
    images = transformers.Gemma3ImageProcessor(size=dict(height=32, width=32), image_mean=[0.5] * 3, image_std=[0.5, 0.25, 0.5])
    processor = transformers.Gemma3Processor(images, text, image_seq_length=4)
    model = network(vocab)

    goldens = {}
    number = lambda t: [float(f"{v:.7g}") for v in t.double().flatten().tolist()]
    for name, size in PICTURES.items():
        prompt = "<start_of_turn>user\n<start_of_image>What is the model?<end_of_turn>\n"
        inputs = processor(text=[prompt], images=[[picture(*size)]], return_tensors="pt")
        with torch.no_grad():
            embedding = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output), 0)
            logits = model(**{k: v for k, v in inputs.items() if k != "num_crops"}).logits[0, -1]
        goldens[name] = dict(ids=inputs["input_ids"][0].tolist(), embedding=number(embedding),
                             logprobs=number(torch.log_softmax(logits.double(), -1)))
        print(name, goldens[name]["ids"], tuple(embedding.shape))
    prompt = "<start_of_image><start_of_image>\n  Which?<start_of_image>"
    three = processor(text=[prompt], images=[[picture(32, 32)] * 3], return_tensors="pt")
    goldens["three"] = dict(ids=three["input_ids"][0].tolist())
    print(goldens["three"])
    (OUT / "pictures.json").write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
