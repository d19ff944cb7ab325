"""sparse_checkpoint.py TEMPLATE 7b|26b|72b DIR

A checkpoint of Qwen2-VL-7B's or 72B's shape, or of InternVL2-26B's (InternViT-6B, InternLM2-20B) with Qwen2-VL's tensors,
whose weights are holes in sparse files: all zero, next to nothing on the disk, in shards of about 4 GB as published ones are. TEMPLATE is a Qwen2-VL directory that gives tokenizer and processor. It shows
what a conversion needs in memory and how fast it reads; a converter that holds the model shows at once.
"""
import json
import pathlib
import shutil
import struct
import sys

template, shape, out = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
hidden, inner, layers, heads, kv, tower, depth, tower_heads = {
    "7b": (3584, 18944, 28, 28, 4, 1280, 32, 16),
    "26b": (6144, 16384, 48, 48, 8, 3200, 45, 25),
    "72b": (8192, 29568, 80, 64, 8, 1280, 32, 16),
}[shape]
vocabulary = 152064
out.mkdir(parents=True)
for file in template.iterdir():
    if ".safetensors" not in file.name:
        shutil.copy(file, out)
config = json.loads((template / "config.json").read_text())
config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
           "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": False, "max_window_layers": layers,
           "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
config["vision_config"] |= {"depth": depth, "embed_dim": tower, "num_heads": tower_heads, "hidden_size": hidden}
(out / "config.json").write_text(json.dumps(config, indent=2))

tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
key_width = hidden // heads * kv
for i in range(layers):
    at = f"model.layers.{i}."
    for name, rows in (("q", hidden), ("k", key_width), ("v", key_width)):
        tensors |= {f"{at}self_attn.{name}_proj.weight": (rows, hidden), f"{at}self_attn.{name}_proj.bias": (rows,)}
    tensors |= {f"{at}self_attn.o_proj.weight": (hidden, hidden), f"{at}mlp.gate_proj.weight": (inner, hidden),
                f"{at}mlp.up_proj.weight": (inner, hidden), f"{at}mlp.down_proj.weight": (hidden, inner),
                f"{at}input_layernorm.weight": (hidden,), f"{at}post_attention_layernorm.weight": (hidden,)}
tensors["visual.patch_embed.proj.weight"] = (tower, 3, 2, 14, 14)
for i in range(depth):
    at = f"visual.blocks.{i}."
    for name, rows, columns in (("attn.qkv", 3 * tower, tower), ("attn.proj", tower, tower), ("mlp.fc1", 4 * tower, tower),
                                ("mlp.fc2", tower, 4 * tower)):
        tensors |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
    for norm in ("norm1", "norm2"):
        tensors |= {f"{at}{norm}.weight": (tower,), f"{at}{norm}.bias": (tower,)}
tensors |= {"visual.merger.ln_q.weight": (tower,), "visual.merger.ln_q.bias": (tower,),
            "visual.merger.mlp.0.weight": (4 * tower, 4 * tower), "visual.merger.mlp.0.bias": (4 * tower,),
            "visual.merger.mlp.2.weight": (hidden, 4 * tower), "visual.merger.mlp.2.bias": (hidden,)}

shards, size = [{}], 0
for name, dims in tensors.items():
    length = 2
    for d in dims:
        length *= d
    if size + length > 4 << 30 and shards[-1]:
        shards.append({})
        size = 0
    shards[-1][name] = {"dtype": "BF16", "shape": dims, "data_offsets": [size, size + length]}
    size += length
index = {}
for i, shard in enumerate(shards):
    file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    index |= dict.fromkeys(shard, file)
    header = json.dumps(shard).encode()
    header += b" " * (-len(header) % 8)
    with open(out / file, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + max(t["data_offsets"][1] for t in shard.values()))
(out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
