"""shape.py OUT TEMPLATE {7b|72b|tiny} BLOCKS PAIRS TILES

A random LLaVA-OneVision checkpoint (bf16) of a published shape with BLOCKS decoder blocks, in OUT/model, and PAIRS
pictures of TILES (1 or 4) tiles with a question and an answer each, in OUT/pairs.jsonl. TEMPLATE is a checkpoint
directory of the same family, from which the tokenizer and the configuration's skeleton are taken. Needs torch and
safetensors; numbers are made on the GPU where there is one.
"""
import json
import os
import random
import shutil
import struct
import sys
import zlib

import torch
from safetensors.torch import save_file

out, template, shape, blocks, pairs, tiles = sys.argv[1:4] + [int(a) for a in sys.argv[4:7]]
model = f"{out}/model"
os.makedirs(f"{out}/pictures", exist_ok=True)
os.makedirs(model, exist_ok=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator(device)
generator.manual_seed(1)
# hidden, inner, heads, key heads, vocabulary; the tower's width, inner, heads, layers, picture side, patch side
SHAPES = {
    "7b": (3584, 18944, 28, 4, 152064, 1152, 4304, 16, 26, 384, 14),
    "72b": (8192, 29568, 64, 8, 152064, 1152, 4304, 16, 26, 384, 14),
    "tiny": (256, 512, 4, 2, 16384, 128, 256, 2, 2, 112, 14),
}
H, I, heads, kv, vocab, VH, VI, vheads, vlayers, side, patch = SHAPES[shape]

config = json.load(open(f"{template}/config.json"))
pinpoints = [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)]
config["image_grid_pinpoints"] = pinpoints
config["text_config"].update(
    hidden_size=H, intermediate_size=I, num_attention_heads=heads, num_key_value_heads=kv, num_hidden_layers=blocks,
    vocab_size=vocab, max_position_embeddings=32768, rope_theta=1000000.0, tie_word_embeddings=False)
config["tie_word_embeddings"] = False
config["vision_config"].update(
    hidden_size=VH, intermediate_size=VI, num_attention_heads=vheads, num_hidden_layers=vlayers, image_size=side,
    patch_size=patch)
json.dump(config, open(f"{model}/config.json", "w"))
for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
             "generation_config.json", "processor_config.json"):
    if os.path.exists(f"{template}/{file}"):
        shutil.copyfile(f"{template}/{file}", f"{model}/{file}")
pre = json.load(open(f"{template}/preprocessor_config.json"))
pre["image_grid_pinpoints"], pre["size"] = pinpoints, {"height": side, "width": side}
json.dump(pre, open(f"{model}/preprocessor_config.json", "w"))


def rnd(*s):
    return (torch.randn(*s, generator=generator, device=device) * 0.02).bfloat16().cpu()


def norm(n):
    """A few large channels, as language models have."""
    w = torch.ones(n, device=device) + torch.randn(n, generator=generator, device=device) * 0.1
    w[torch.randperm(n, generator=generator, device=device)[: n // 128]] *= 8
    return w.bfloat16().cpu()


files = {}


def put(tensors):
    name = f"model-{len(set(files.values())):05d}.safetensors"
    save_file(tensors, f"{model}/{name}", metadata={"format": "pt"})
    files.update({key: name for key in tensors})


L = "language_model.model."
put({L + "embed_tokens.weight": rnd(vocab, H)})
put({"language_model.lm_head.weight": rnd(vocab, H), L + "norm.weight": norm(H)})
width = H // heads * kv
for i in range(blocks):
    p, t = f"{L}layers.{i}.", {}
    for name, rows, cols, bias in (
            ("self_attn.q_proj", H, H, True), ("self_attn.k_proj", width, H, True), ("self_attn.v_proj", width, H, True),
            ("self_attn.o_proj", H, H, False), ("mlp.gate_proj", I, H, False), ("mlp.up_proj", I, H, False),
            ("mlp.down_proj", H, I, False)):
        t[f"{p}{name}.weight"] = rnd(rows, cols)
        if bias:
            t[f"{p}{name}.bias"] = rnd(rows)
    t[p + "input_layernorm.weight"], t[p + "post_attention_layernorm.weight"] = norm(H), norm(H)
    put(t)
V = "vision_tower.vision_model."
t = {"image_newline": rnd(H), "multi_modal_projector.linear_1.weight": rnd(H, VH),
     "multi_modal_projector.linear_1.bias": rnd(H), "multi_modal_projector.linear_2.weight": rnd(H, H),
     "multi_modal_projector.linear_2.bias": rnd(H), V + "embeddings.patch_embedding.weight": rnd(VH, 3, patch, patch),
     V + "embeddings.patch_embedding.bias": rnd(VH),
     V + "embeddings.position_embedding.weight": rnd((side // patch) ** 2, VH), V + "post_layernorm.weight": norm(VH),
     V + "post_layernorm.bias": rnd(VH)}
for i in range(vlayers):
    p = f"{V}encoder.layers.{i}."
    for name, rows, cols in (("self_attn.q_proj", VH, VH), ("self_attn.k_proj", VH, VH), ("self_attn.v_proj", VH, VH),
                             ("self_attn.out_proj", VH, VH), ("mlp.fc1", VI, VH), ("mlp.fc2", VH, VI)):
        t[f"{p}{name}.weight"], t[f"{p}{name}.bias"] = rnd(rows, cols), rnd(rows)
    for name in ("layer_norm1", "layer_norm2"):
        t[f"{p}{name}.weight"], t[f"{p}{name}.bias"] = norm(VH), rnd(VH)
put(t)
json.dump({"metadata": {}, "weight_map": files}, open(f"{model}/model.safetensors.index.json", "w"))


def png(path, size, seed):
    """Coloured rectangles; written by hand, so that no picture library is needed."""
    r = random.Random(seed)
    rows = [bytearray(bytes(r.randrange(256) for _ in range(3)) * size) for _ in range(size)]
    for _ in range(40):
        x, y, w, h = (r.randrange(size) for _ in range(4))
        colour = bytes(r.randrange(256) for _ in range(3))
        for row in rows[y:y + h]:
            n = min(w, size - x)
            row[3 * x:3 * (x + n)] = colour * n
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 1)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


words = "red green blue square circle left right above below large small bright dark edge corner middle".split()
with open(f"{out}/pairs.jsonl", "w") as f:
    for i in range(pairs):
        r = random.Random(i)
        png(f"{out}/pictures/{i}.png", side * (1 if tiles == 1 else 2), i)
        answer = " ".join(r.choice(words) for _ in range(40 + r.randrange(40))) + "."
        f.write(json.dumps({"image": f"pictures/{i}.png", "question": "What is in this picture?", "answer": answer}) + "\n")
print("made", out, shape, blocks, "blocks,", pairs, "pairs of", tiles, "tiles")
