"""Reads cards as the Hugging Face hub's own library does, and file names as llama.cpp's converter does.

    python tests/reference/card_check.py FOLDER... [--gguf-py DIR]

Each FOLDER holds README.md as `mbq-convert card` writes it, and the models. Needs huggingface_hub (transformers brings it);
names are parsed where gguf is installed, or with llama.cpp's gguf-py in DIR. Ends with 1 where something differs.
"""
import argparse
import re
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("folders", nargs="+", type=Path)
parser.add_argument("--gguf-py", type=Path)
args = parser.parse_args()
if args.gguf_py:
    sys.path.insert(0, str(args.gguf_py))
try:
    from huggingface_hub import ModelCard, ModelCardData
except ImportError:
    sys.exit("skipped: no huggingface_hub")
try:
    from gguf import GGUFReader
    from gguf.metadata import Metadata
except ImportError:
    Metadata = None

KNOWN = {"base_model": str, "license": str, "license_name": str, "license_link": str, "pipeline_tag": str, "library_name": str,
         "base_model_relation": str, "quantized_by": str, "language": list, "tags": list}
wrong = 0


def expect(right, *words):
    global wrong
    if not right:
        wrong += 1
        print("WRONG:", *words)


for folder in args.folders:
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    for key, value in data.items():
        expect(isinstance(value, KNOWN.get(key, ())), folder, key, repr(value))
        for item in value if isinstance(value, list) else [value]:
            expect(isinstance(item, str), folder, key, repr(item))
    # The library's own class takes every key, and writes what reads back alike.
    again = ModelCardData(**data)
    expect(again.to_dict() == data, folder, "differs when it is written again")
    expect(data.get("pipeline_tag") == "image-text-to-text", folder, "pipeline_tag")
    for model in sorted(folder.glob("*.gguf")):
        if Metadata is None or model.name.startswith("mmproj"):
            continue
        stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", model.name)
        name, _, encoding = stem.rpartition("-")
        expect(name, folder, model.name, "has no type behind a dash")
        _, _, base, finetune, version, size = Metadata.get_model_id_components(name)
        expect(base and size, folder, model.name, "has no base or no size for gguf-py")
        print(f"{model.name}: base {base}, size {size}, fine-tune {finetune}, version {version}, type {encoding}")
    print(f"{folder.name}: {len(data)} keys, {', '.join(data)}")
sys.exit(bool(wrong))
