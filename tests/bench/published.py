#!/usr/bin/env python3
"""Makes checkpoints for mutants.py of published metadata: published.py PUBLISHED DIR [NAME …]

PUBLISHED has a folder per repository with its configurations, tokenizer and index. Every key of them stays but for sizes,
which are made small, and a vocabulary, which is cut, so that a conversion takes a tenth of a second; weights are zeros, in a sparse file, under the index's names.
Where a repository's tokenizer.json is not there, its added tokens go into another's vocabulary.
"""
import json, re, shutil, struct, sys
from pathlib import Path

HIDDEN, HEADS, KV, INNER, LAYERS, TOWER, TOWER_INNER = 128, 2, 1, 128, 3, 64, 128
KEPT = 2000  # tokens of a vocabulary, before the added ones
QWEN, LLAVA, SMOL = "Qwen--Qwen3-tokenizer", "llava-hf--llava-1.5-7b-hf", "HuggingFaceTB--SmolVLM-256M-Instruct"
# Of each: whose index (or how the names are made) and whose tokenizer.
MODELS = {
    "llava-hf--llava-1.5-7b-hf": (LLAVA, LLAVA),
    "llava-hf--llava-v1.6-mistral-7b-hf": (LLAVA, LLAVA),
    "HuggingFaceTB--SmolVLM-256M-Instruct": ("idefics3", SMOL),
    "ibm-granite--granite-docling-258M": ("idefics3", QWEN),
    "Qwen--Qwen2-VL-2B-Instruct": ("MBZUAI--AIN", QWEN),
    "MBZUAI--AIN": ("MBZUAI--AIN", QWEN),
    "allenai--olmOCR-7B-0225-preview": ("allenai--olmOCR-7B-0225-preview", QWEN),
    "Qwen--Qwen2.5-VL-3B-Instruct": ("Qwen--Qwen2.5-VL-7B-Instruct", QWEN),
    "Qwen--Qwen2.5-VL-7B-Instruct": ("Qwen--Qwen2.5-VL-7B-Instruct", QWEN),
    "Qwen--Qwen3-VL-4B-Instruct": ("Qwen--Qwen3-VL-Embedding-8B", QWEN),
    "nvidia--Cosmos-Reason2-8B": ("nvidia--Cosmos-Reason2-8B", QWEN),
    "OpenGVLab--InternVL2-1B": ("internvl", QWEN),
    "OpenGVLab--InternVL3-2B": ("internvl", QWEN),
    "google--gemma-3-4b-it": ("google--medgemma-27b-it", "gemma3"),
}


def small(config):
    """The configuration with small sizes, and its text and vision sections."""
    text = config.get("text_config") or config.get("llm_config") or config
    vision = config["vision_config"]
    old_head = text.get("head_dim") or text.get("hidden_size", 4096) // text.get("num_attention_heads", 32)
    text.update(hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV, intermediate_size=INNER, num_hidden_layers=LAYERS)
    if "head_dim" in text:
        text["head_dim"] = HIDDEN // HEADS
    if "max_window_layers" in text:
        text["max_window_layers"] = LAYERS
    sections = (text.get("rope_scaling") or {}).get("mrope_section")
    if sections:
        text["rope_scaling"]["mrope_section"] = [n * HIDDEN // HEADS // old_head for n in sections]
    kind = config["model_type"]
    if kind.startswith("qwen"):
        vision.update(depth=3 if kind == "qwen3_vl" else 2, num_heads=2)
        vision["hidden_size" if kind != "qwen2_vl" else "embed_dim"] = TOWER
        vision.update({"qwen2_vl": dict(hidden_size=HIDDEN), "qwen2_5_vl": dict(fullatt_block_indexes=[1], intermediate_size=TOWER_INNER)}.get(
            kind, dict(deepstack_visual_indexes=[0, 1], intermediate_size=TOWER_INNER)))
        if "out_hidden_size" in vision:
            vision["out_hidden_size"] = HIDDEN
    else:
        vision.update(hidden_size=TOWER, intermediate_size=TOWER_INNER, num_attention_heads=2, num_hidden_layers=3)
    return text, vision


def names(published, kind, config, layers, depth):
    """Tensors' names: those of an index of which the first blocks count, or made."""
    if kind == "idefics3":
        text = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
        tower = [f"{part}.{end}" for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")))
                 for end in ("weight", "bias")]
        embeddings = [f"embeddings.{part}" for part in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")]
        return ["model.text_model.embed_tokens.weight", "model.text_model.norm.weight", "model.connector.modality_projection.proj.weight",
                *([] if config.get("tie_word_embeddings") else ["lm_head.weight"]),
                *(f"model.text_model.layers.{i}.{part}.weight" for i in range(layers) for part in text),
                *(f"model.vision_model.encoder.layers.{i}.{part}" for i in range(depth) for part in tower),
                *(f"model.vision_model.{part}" for part in [*embeddings, "post_layernorm.weight", "post_layernorm.bias"])]
    index = "MBZUAI--AIN" if kind == "internvl" else kind
    listed = list(json.loads((published / index / "model.safetensors.index.json").read_text())["weight_map"])
    if kind == "internvl":
        original = json.loads((published / "OpenGVLab--InternVL2-8B/model.safetensors.index.json").read_text())["weight_map"]
        listed = ["language_model." + name for name in listed if "visual" not in name] + [n for n in original if not n.startswith("language")]
    if config["model_type"] == "llava_next":
        listed.append("image_newline")
    tied = config.get("tie_word_embeddings") or config["model_type"] == "gemma3"

    def kept(name):
        block = re.search(r"(layers|blocks|list)\.(\d+)\.", name)
        most = {"list": 2, "blocks": depth}.get(block and block[1], depth if "vision" in name else layers)
        return (block is None or int(block[2]) < most) and not (tied and "lm_head" in name)

    return [name for name in listed if kept(name)]


def shape(name, text, vision, config):
    """Of a published model's tensor in the small sizes."""
    part = re.sub(r"^.*?(layers|blocks|list)\.\d+\.", "", name)
    head = text.get("head_dim") or (256 if config["model_type"] == "gemma3" else HIDDEN // HEADS)
    tower = re.search("vision|visual", name)
    inner = vision.get("intermediate_size") or 4 * TOWER
    patch, merged = vision.get("patch_size", 14), 4 * TOWER
    if name.endswith("image_newline"):
        return [HIDDEN]
    if re.search("embed_tokens|lm_head|tok_embeddings", name):
        return [text["vocab_size"], HIDDEN]
    if "mm_input_projection" in name:
        return [TOWER, HIDDEN]
    if "soft_emb_norm" in name:
        return [TOWER]
    if "modality_projection" in name:
        return [HIDDEN, TOWER * config["scale_factor"] ** 2]
    if re.search(r"merger|mlp1\.|multi_modal", name):
        last = re.search(r"fc2|mlp\.2|mlp1\.3|linear_2", name)
        wide = TOWER if "multi_modal" in name else merged
        if "ln_q" in name or (".norm." in name and "list" not in name):
            return [TOWER]
        if "norm" in name or "mlp1.0" in name:
            return [merged]
        rows = HIDDEN if last or re.search("multi_modal|mlp1", name) else merged
        columns = HIDDEN if re.search("linear_2|mlp1.3", name) else wide
        return [rows, columns] if "weight" in name else [rows]
    if tower:
        if "patch_emb" in name:
            frames = [2] if "visual" in name else []
            return [TOWER, 3, *frames, patch, patch] if "weight" in name else [TOWER]
        grid = (vision.get("image_size") or 0) // patch
        if "class_embedding" in name:
            return [1, 1, TOWER] if name.startswith("vision_model") else [TOWER]
        if "position_embedding" in name:
            extra = 0 if re.search("siglip|idefics3", str(vision.get("model_type"))) else 1
            return [1, grid ** 2 + 1, TOWER] if name.startswith("vision_model") else [grid ** 2 + extra, TOWER]
        if "pos_embed" in name:
            return [vision["num_position_embeddings"], TOWER]
        if "qkv" in part:
            return [3 * TOWER, TOWER] if "weight" in part else [3 * TOWER]
        if re.search("fc1|gate_proj|up_proj", part):
            return [inner, TOWER] if "weight" in part else [inner]
        if re.search("fc2|down_proj", part):
            return [TOWER, inner] if "weight" in part else [TOWER]
        return [TOWER, TOWER] if "proj" in part and "weight" in part else [TOWER]
    if re.search("q_norm|k_norm", part):
        return [head]
    rows = {"q": HEADS * head, "k": KV * head, "v": KV * head}.get(part.split("_proj")[0].split(".")[-1], HIDDEN)
    if re.search("gate_proj|up_proj", part):
        rows = INNER
    columns = INNER if "down_proj" in part else HEADS * head if "o_proj" in part else HIDDEN
    return [rows, columns] if "proj" in part and "weight" in part else [rows]


def tokenizer(base, added, first):
    """`base` with a repository's added tokens in place of its own, from `first` on, behind the beginning of its vocabulary."""
    base["added_tokens"] = [{"id": int(i), **entry} for i, entry in sorted(added.items(), key=lambda pair: int(pair[0]))] or base["added_tokens"]
    names = {token["content"]: token["id"] for token in base["added_tokens"]}
    vocab = {token: i for token, i in base["model"]["vocab"].items() if i < first and names.get(token, i) == i}
    base["model"]["vocab"] = vocab | {f"<unused{i}>": i for i in sorted(set(range(first)) - {*vocab.values(), *names.values()})}
    parts = lambda merge: merge if isinstance(merge, list) else merge.split(" ")
    known = vocab.keys() - names.keys()
    base["model"]["merges"] = [m for m in base["model"]["merges"] if {*parts(m), "".join(parts(m))} <= known]
    return base


def moved(value, first, kept):
    """Numbers of the tokens behind the vocabulary, which is cut."""
    if isinstance(value, dict):
        return {str(moved(int(k), first, kept)) if k.isdigit() else k: moved(v, first, kept) for k, v in value.items()}
    if isinstance(value, list):
        return [moved(v, first, kept) for v in value]
    near = type(value) is int and first <= value < first + 1000
    return value - first + kept if near else value


def make(published, name, out):
    source, (kind, vocabulary) = published / name, MODELS[name]
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name and "config.edited" not in file.name:
            shutil.copy(file, out / re.sub(r"\.(quoted|edited)\.", ".", file.name))
    config_file = next(source / f"config.{end}json" for end in ("", "quoted.", "edited.") if (source / f"config.{end}json").exists())
    config = json.loads(config_file.read_text())
    if name == "OpenGVLab--InternVL3-2B":  # Its tower was edited.
        config["vision_config"] = json.loads((published / "OpenGVLab--InternVL2-1B/config.json").read_text())["vision_config"]
    text, vision = small(config)
    if kind == LLAVA and name != LLAVA:
        for file in ("tokenizer_config.json", "added_tokens.json"):
            shutil.copy(published / LLAVA / file, out)
    text.setdefault("vocab_size", 262208)
    if vocabulary == "gemma3":  # A vocabulary of the tests, whose last tokens are those of pictures.
        shutil.copy(Path(__file__).parent.parent / "golden/gemma3/tokenizer.json", out)
        config |= {"boi_token_index": 1213, "eoi_token_index": 1214, "image_token_index": 1215, "eos_token_id": [1]}
        text["vocab_size"] = 1280
        tokens = json.loads((out / "tokenizer_config.json").read_text())
        del tokens["added_tokens_decoder"]
        (out / "tokenizer_config.json").write_text(json.dumps(tokens))
        (out / "generation_config.json").unlink()
        (out / "added_tokens.json").unlink()
    else:
        base = json.loads((published / vocabulary / "tokenizer.json").read_text())
        added = json.loads((out / "tokenizer_config.json").read_text()).get("added_tokens_decoder", {})
        kept = 32000 if vocabulary == LLAVA else KEPT  # SentencePiece's merges are whole
        first = min(i for i in map(int, added) if i >= KEPT)
        (out / "tokenizer.json").write_text(json.dumps(tokenizer(base, moved(added, first, kept), kept)))
        config = moved(config, first, kept)
        for file in ("tokenizer_config.json", "added_tokens.json", "generation_config.json"):
            if (out / file).exists():
                (out / file).write_text(json.dumps(moved(json.loads((out / file).read_text()), first, kept), indent=2))
        text, vision = config.get("text_config") or config.get("llm_config") or config, config["vision_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    header, at = {}, 0
    for tensor in names(published, kind, config, LAYERS, vision.get("depth") or vision["num_hidden_layers"]):
        dims = shape(tensor, text, vision, config)
        size = 2
        for d in dims:
            size *= d
        header[tensor] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    with open(out / "model-00001-of-00001.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + at)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": at}, "weight_map": dict.fromkeys(header, "model-00001-of-00001.safetensors")}))


if __name__ == "__main__":
    published, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:] or MODELS:
        make(published, name, out / name)
