"""Writes tests/golden/conversations.json: what transformers makes of conversations with several turns and pictures on
demo/model, worded by
tests/golden/conversations.jinja: token ids (a picture's token once for each of its embeddings), which of them are answers (with the end of
turn), and of every embedding the first two values and the sum.

Pictures are resized by Pillow (the `pil` image processor), as this program does. Run in the repository's root.
"""

import json

import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

MODEL = "demo/model"
PICTURES = ["demo/pictures/green-arrow.png", "tests/golden/pictures/wide.png", "tests/golden/pictures/odd-row.png"]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
processor = LlavaOnevisionImageProcessorPil.from_pretrained(MODEL)
model = LlavaOnevisionForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
# With a newline behind the role an answer that is given is worded as one that is awaited, so that the whole
# conversation can be compared; the published template writes a space and a newline there.
template = open("tests/golden/conversations.jinja").read()
image_token = model.config.image_token_index if hasattr(model.config, "image_token_index") else model.config.image_token_id


def golden(messages, paths):
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    # The last newline is the template's, after the end of turn.
    ids = tokenizer(text.removesuffix("\n"))["input_ids"]
    pixels = processor([[Image.open(p).convert("RGB") for p in paths]], return_tensors="pt") if paths else {}
    rows = []
    if paths:
        features = model.get_image_features(
            pixels["pixel_values"],
            image_sizes=pixels["image_sizes"],
            batch_num_images=pixels["batch_num_images"],
            vision_aspect_ratio="anyres_max_9",
        )
        rows = list(getattr(features, "pooler_output", features))
    table = model.get_input_embeddings().weight
    out_ids, answers, embeds, at = [], [], [], 0
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    speaking = False
    for i, token in enumerate(ids):
        if token == image_token:
            out_ids += [token] * len(rows[at])
            answers += [0] * len(rows[at])
            embeds += list(rows[at])
            at += 1
            continue
        out_ids.append(token)
        answers.append(int(speaking))
        embeds.append(table[token])
        if speaking and token == end:
            speaking = False
        if ids[i + 1 - len(header) : i + 1] == header:
            speaking = True
    assert at == len(rows)
    return {
        "messages": messages,
        "pictures": paths,
        "ids": out_ids,
        "answers": answers,
        "embeds": [[round(float(v), 6) for v in (e[0], e[1], e.sum())] for e in embeds],
    }


def user(*parts):
    return {"role": "user", "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}


def said(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


conversations = [
    ([said("system", "Answer in a word."), user(None, "What is it?"), said("assistant", "A star."),
      user("Which colour?"), said("assistant", "Red.")], PICTURES[:1]),
    ([user("Is", None, "like", None, "?"), said("assistant", "No.")], PICTURES[:2]),
    ([user(None, "What is it?"), said("assistant", "A star."), user(None, "And this?"), said("assistant", "A moon."),
      user("Sure?"), said("assistant", "Yes.")], PICTURES[1:3]),
    ([user("What is a star?"), said("assistant", "A shape."), user("And red?"), said("assistant", "A colour.")], []),
]
with torch.no_grad():
    found = [golden(*c) for c in conversations]
json.dump(found, open("tests/golden/conversations.json", "w"))
open("tests/golden/conversations.json", "a").write("\n")
