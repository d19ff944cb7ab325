#!/usr/bin/env python3
"""Makes tests/fuzz/seeds.zip, what fuzzing starts from: `seeds.py FOLDER`.

FOLDER holds what the tests' small models are made of, a folder each: checkpoints (config.json, model*.safetensors, …),
GGUF files (*.gguf), records (*.mbq.json) and an evaluation (eval.json, with its record.json). The rest is from tests/golden.
`seeds.py FOLDER OUT` unpacks seeds.zip to OUT, a folder per target, each with a dictionary, and adds, where MBQ_SHARED
names a folder of published metadata, configurations and templates that are not for the repository.
"""
import base64
import hashlib
import io
import json
import os
import pathlib
import re
import struct
import sys
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
SEPARATOR = b"\x1e"
CHECKPOINT = ["config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
              "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "README.md"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
             "generation_config.json", "processor_config.json", "chat_template.json", "vocab.json", "merges.txt"]
# Of each family one, but for InternVL and LLaVA, whose text models and layouts differ.
KINDS = set()


def read(path):
    return path.read_bytes() if path.exists() else b""


def compact(text):
    return json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode() if text else b""


def weights(folder):
    """One header with all of a checkpoint's tensors."""
    header, at = {}, 0
    for file in sorted(folder.glob("model*.safetensors")):
        data = file.read_bytes()
        own = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])
        for name, entry in own.items():
            if name != "__metadata__":
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                header[name] = {**entry, "data_offsets": [at, at + size]}
                at += size
    return json.dumps(header, separators=(",", ":")).encode()


def checkpoints(folder):
    for config in sorted(folder.rglob("config.json")):
        dir, json_config = config.parent, json.loads(config.read_bytes())
        text = json_config.get("text_config") or json_config.get("llm_config") or {}
        kind = "-".join(str(part) for part in [json_config.get("model_type"), *json_config.get("architectures", []),
                                              text.get("model_type"), (text.get("architectures") or [""])[0]])
        if kind in KINDS or kind.startswith(("llava-LlavaLlama", "llava-LlavaMistral")) or not list(dir.glob("model*.safetensors")):
            continue
        KINDS.add(kind)
        parts = [compact(read(dir / name)) if name.endswith("json") else read(dir / name) for name in CHECKPOINT]
        yield f"checkpoint/{kind}", SEPARATOR.join([*parts, weights(dir)])
    tokenizers = {
        "sentencepiece": GOLDEN / "sentencepiece/tokenizer.json",
        "gemma3": GOLDEN / "gemma3/tokenizer.json",
        "byte-level": next(folder.rglob("tokenizer.json")),
    }
    for name, path in tokenizers.items():
        config = read(path.parent / "tokenizer_config.json") or b'{"eos_token": "</s>", "added_tokens_decoder": {}}'
        rest = [b"", b'{"pad_token": {"content": "<pad>"}}', b'{"eos_token_id": [2, 1]}', b'{"image_token": "<image>"}',
                b'{"chat_template": "{{ messages[0].content }}"}']
        yield f"tokenizer/{name}", SEPARATOR.join([compact(read(path)), compact(config), *rest])
    bpe = json.loads(tokenizers["byte-level"].read_bytes())["model"]
    merges = "#version: 0.2\n" + "\n".join(m if isinstance(m, str) else " ".join(m) for m in bpe["merges"])
    parts = [b"", b'{"tokenizer_class": "Qwen2Tokenizer"}', b'{"<a>": 298}', b"", b"", b"", b"",
             json.dumps(bpe["vocab"], separators=(",", ":")).encode(), merges.encode()]
    yield "tokenizer/three-files", SEPARATOR.join(parts)


WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def trimmed(data, keep):
    """A GGUF's header with arrays cut to `keep` elements; without data."""
    at = 8

    def take(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def skip(text, width):
        """A value: a length and that many bytes, or `width` bytes."""
        nonlocal at
        length = take("Q") if text else width
        at += length

    tensors, pairs = take("Q"), take("Q")
    out = [data[:8], struct.pack("<QQ", tensors, pairs)]
    for _ in range(pairs):
        start = at
        skip(True, 0)
        kind = take("I")
        if kind != 9:
            skip(kind == 8, WIDTHS.get(kind))
            out.append(data[start:at])
            continue
        element, count = take("I"), take("Q")
        kept = min(count, keep)
        out.append(data[start:at - 8] + struct.pack("<Q", kept))
        for i in range(count):
            start = at
            skip(element == 8, WIDTHS.get(element))
            if i < kept:
                out.append(data[start:at])
    start = at
    for _ in range(tensors):
        skip(True, 0)
        dimensions = take("I")
        at += 8 * dimensions + 12
    return b"".join(out) + data[start:at]


def ggufs(folder):
    seen = set()
    for path in sorted(folder.rglob("*.gguf"), key=lambda path: path.stat().st_size):
        seed = trimmed(path.read_bytes(), 4)
        at = seed.find(b"general.architecture") + 32
        kind = (seed[at:at + 8], seed.find(b"clip.projector_type") > 0 and seed[seed.find(b"clip.projector_type"):][:36])
        if kind not in seen and len(seed) < 12 << 10:
            seen.add(kind)
            yield f"gguf/{len(seen)}", seed
    key = lambda name, kind, value: struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    string = lambda text: struct.pack("<Q", len(text)) + text
    tensor = lambda name, shape, kind, at: (
        string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, at))
    shards = b""
    for no in range(2):
        keys = [key(b"general.architecture", 8, string(b"qwen2")), key(b"split.no", 2, struct.pack("<H", no)),
                key(b"split.count", 2, b"\x02\0"), key(b"split.tensors.count", 5, struct.pack("<i", 2))]
        shards += b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys)
        shards += tensor(b"%d" % no, [32, 2], [0, 8][no], 0)
    yield "gguf/shards", shards
    every = [key(b"k%d" % kind, kind, bytes(width)) for kind, width in WIDTHS.items()]
    every += [key(b"a%d" % kind, 9, struct.pack("<IQ", kind, 2) + bytes(2 * width)) for kind, width in WIDTHS.items()]
    every += [key(b"general.alignment", 4, struct.pack("<I", 64)), key(b"general.architecture", 8, string(b"clip"))]
    types = [(0, 4), (1, 2), (2, 32), (8, 32), (12, 256), (14, 256), (21, 256), (23, 256), (30, 1), (142, 128)]
    tensors = [tensor(b"t%d" % kind, [block, 1], kind, 1024 * i) for i, (kind, block) in enumerate(types)]
    yield "gguf/kinds", b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(every)) + b"".join(every + tensors)


def safetensors(entries, data):
    header = json.dumps(entries, separators=(",", ":")).encode()
    return struct.pack("<Q", len(header)) + header + data


def weight_files():
    entry = lambda kind, shape, start, end: {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    yield "safetensors/three", safetensors(
        {"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 2], 0, 16), "model.b": entry("BF16", [4], 16, 24),
         "c": entry("F16", [1, 2], 24, 28)}, struct.pack("<4f", 1, -1, .5, 0) + bytes(12))
    yield "safetensors/empty", safetensors({}, b"")
    yield "safetensors/scalar", safetensors({"s": entry("F64", [], 0, 8), "z": entry("I8", [0, 3], 8, 8)}, bytes(8))
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    yield "index/two", json.dumps({"metadata": {"total_size": 16}, "weight_map": names}).encode()
    yield "index/outside", json.dumps({"weight_map": {"a": "../x.safetensors", "b": "/x.safetensors"}}).encode()
    for path in sorted((GOLDEN / "torch").glob("*.bin")):
        yield f"torch/{path.stem}", path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("/data.pkl"):
                        yield f"pickle/{path.stem}", archive.read(name)
    # One tensor in the storage that the target gives it.
    yield "pickle/sound", (
        b"\x80\x02}q\x00X\x01\0\0\0wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\0\0\0storageq\x03ctorch\nFloatStorage\n"
        b"q\x04X\x01\0\0\x000q\x05X\x03\0\0\0cpuq\x06K\x10tq\x07QK\0K\x04K\x04\x86q\x08K\x04K\x01\x86q\x09\x89}q\x0atq\x0bRq\x0cs.")
    yield "sentencepiece/golden", (GOLDEN / "sentencepiece/tokenizer.model").read_bytes()[:6000]
    yield "sentencepiece/whole", (GOLDEN / "sentencepiece/tokenizer.model").read_bytes()
    block = lambda d, m, fill: struct.pack("<HH", d, m) + bytes([fill]) * 48
    yield "mbq3/blocks", block(0x3C00, 0xBC00, 0xA5) + block(0x0001, 0x8000, 0xFF) + block(0x7BFF, 0x7BFF, 0)
    yield "mbq3/infinite", block(0x7C00, 0x3C00, 1) + block(0x3C00, 0x7E00, 1)
    yield "mbq3/weights", struct.pack("<128f", *[i / 7 - 9 for i in range(128)]) + struct.pack("<128f", *[2e38, -2e38] * 64)


def pictures():
    for folder in ["load", "star"]:
        for path in sorted((GOLDEN / "pictures" / folder).iterdir()):
            if path.suffix != ".json" and path.stat().st_size < 2000 and path.stem not in [f"exif{i}" for i in range(2, 8)]:
                yield f"picture/{path.name}", path.read_bytes()
    yield "picture/tiny.png", (GOLDEN / "pictures/tiny.png").read_bytes()


def texts():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A star."}]
    roles = [{"role": "system", "content": "Be brief."},
             {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
             {"role": "assistant", "content": "A star."}]
    url = "data:image/gif;base64," + base64.b64encode(
        b"GIF89a\x01\0\x01\0\x80\0\0\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;").decode()
    yield "pairs/llava", json.dumps([{"id": 1, "image": "a.gif", "conversations": turns}] * 2).encode()
    yield "pairs/openai", "\n".join(json.dumps({"messages": roles, "images": ["a.gif"]}) for _ in range(2)).encode()
    inside = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]},
              {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]}]
    yield "pairs/inside", json.dumps([{"messages": inside, "system": "Be brief."}]).encode()
    yield "pairs/caption", b'\xef\xbb\xbf{"image": ["a.gif"], "caption": "A dot."}\n{"question": "1?", "answer": "2", "image": null}'
    yield "pairs/outside", b'[{"image": "../a.gif", "question": "?", "answer": "x"}, {"image": "file:///a.gif", "question": "?", "answer": "x"}]'
    yield "questions/all", (
        b'{"image": "a.gif", "question": "What?", "answer": " red ", "kind": "color"}\n\n'
        b'{"id": 7, "question": "One and one?", "answer": "two", "extra": [1e400]}\n{"prompt": "Once", "answer": " a time"}\n')
    yield "questions/outside", b'{"image": "../a.gif", "question": "What?", "answer": "x"}'
    for entry in json.loads((GOLDEN / "prompts.json").read_text())["templates"]:
        if len(entry["source"]) < 3000:
            name = "".join(c if c.isalnum() else "-" for c in entry["name"])
            yield f"template/{name}", entry["source"].encode()
    loop = "{% for i in range(10) %}{% for m in messages %}{{ m.content[0].text * 3 }}{% endfor %}{% endfor %}"
    yield "template/loops", loop.encode()
    yield "template/grows", b"{% set n = namespace(t='a') %}{% for i in range(9) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}{{ messages[0].content | tojson(indent=2) }}"
    siblings = [{"rfilename": name} for name in ["config.json", "model.safetensors", "../x.json", "pytorch_model.bin", "a/b.json"]]
    yield "hub/two", json.dumps({"sha": "0" * 40, "siblings": siblings, "id": "org/name"}).encode()
    yield "hub/outside", json.dumps({"sha": "../../x", "siblings": siblings}).encode()
    whole = {"model": "m", "messages": roles, "temperature": .5, "top_p": .9, "seed": 1, "stop": ["\n"], "max_tokens": 5,
             "stream": True, "stream_options": {"include_usage": True}, "user": "u", "tools": []}
    whole["messages"][1]["content"][0] = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    yield "request/whole", json.dumps(whole).encode()
    for name, link in [("file", "file:///a%2egif"), ("inside", "a.gif"), ("outside", "../../etc/passwd")]:
        content = [{"type": "image_url", "image_url": link}, {"type": "text", "text": "?"}]
        yield f"request/{name}", json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    yield "headers/good", b"Host:localhost:8080\nOrigin:http://localhost:8080\nAuthorization:Bearer key"
    yield "headers/address", b"host:[::1]\nauthorization:bearer  key"
    yield "card/model", (
        b"---\nlicense: apache-2.0\nlanguage:\n- en\n- no\ntags: [a, \"b\", {a: b}]\nbase_model: &x org/Base-7B\nlicense_name: >-\n"
        b"  A\n  B\nmodel-index:\n- name: *x\n  results: [{task: {type: t}}]\n---\n# A model\n")


def empty_model():
    key = lambda name, value: struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, len(value)) + value
    file = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + key(b"general.architecture", b"qwen2") + key(b"general.name", b"m")
    return file + bytes(-len(file) % 32)


def records(folder):
    """About the model without tensors that the target makes."""
    model = empty_model()
    digest = {"name": "m.gguf", "bytes": len(model), "sha256": hashlib.sha256(model).hexdigest()}

    def own(path):
        record = json.loads(path.read_bytes())
        written = record["summary"]["model"]
        written.update(files=[digest], bytes=len(model), tensors=0)
        record["summary"]["mmproj"] = record["summary"]["pair"] = None
        return json.dumps(record, separators=(",", ":")).replace(str(HERE.parents[1]), "/home/me/mbq-convert").encode()

    plain = sorted(folder.rglob("*.mbq.json"))
    yield "record/plain", own(plain[0])
    calibrated = sorted(folder.rglob("record.json"), key=lambda path: path.stat().st_size)
    for i, path in enumerate(calibrated[-2:]):
        yield f"record/calibrated-{i}", own(path)
    for path in sorted(folder.rglob("eval.json"))[:1]:
        evaluation = json.loads(path.read_bytes())
        evaluation["candidates"][0]["model"]["sha256"] = digest["sha256"]
        yield "evaluation/one", json.dumps(evaluation, separators=(",", ":")).encode() + SEPARATOR + own(plain[0])


def published():
    """Metadata of checkpoints that people have."""
    for folder in sorted((pathlib.Path(os.environ["MBQ_SHARED"]) / "published").iterdir()):
        for path in sorted(folder.glob("*")) if folder.is_dir() else []:
            if path.suffix == ".jinja":
                yield f"template/{folder.name}-{path.name}", path.read_bytes()
            elif path.name == "chat_template.json":
                yield f"template/{folder.name}-json", json.loads(path.read_bytes())["chat_template"].encode()
            elif path.name.endswith("index.json"):
                yield f"index/{folder.name}", path.read_bytes()[:4000]
            elif path.name == "README.md":
                yield f"card/{folder.name}", path.read_bytes()[:4000]
        if (folder / "config.json").exists():
            parts = [compact(read(folder / name)) if name.endswith("json") and name != "tokenizer.json" else b""
                     for name in CHECKPOINT]
            yield f"checkpoint/{folder.name}", SEPARATOR.join([*parts, b"{}"])


def unpacked(out):
    with zipfile.ZipFile(HERE / "seeds.zip") as archive:
        archive.extractall(out)
    for name, seed in published() if "MBQ_SHARED" in os.environ else []:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(seed)
    for target in out.iterdir():
        seeds = b"\n".join(path.read_bytes() for path in sorted(target.iterdir()) if path.name != "dictionary")
        if b"\0" in seeds and target.name != "gguf":
            continue
        # Quoted words, names with dots, what stands in Jinja's tags.
        words = set(re.findall(rb'"[\w.|<>/ -]{2,40}"', seeds)) | set(re.findall(rb"[a-z_]+(?:\.[a-z_0-9]+)+", seeds))
        words |= set(re.findall(rb"\{%-? ?\w+|\| ?\w+|[a-z_]+\(", seeds)) if target.name == "template" else set()
        words = [word for word in words if re.search(rb"[A-Za-z_]{3}|[%|(]", word) and b"<unused" not in word]
        escape = lambda word: "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in word)
        lines = [f'"{escape(word)}"' for word in sorted(words)[:2000]]
        (target / "dictionary").write_text("\n".join(lines) + "\n")


def main():
    folder = pathlib.Path(sys.argv[1])
    if len(sys.argv) > 2:
        return unpacked(pathlib.Path(sys.argv[2]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for make in [lambda: checkpoints(folder), lambda: ggufs(folder), weight_files, pictures, texts, lambda: records(folder)]:
            for name, seed in make():
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), seed, zipfile.ZIP_DEFLATED, 9)
    (HERE / "seeds.zip").write_bytes(out.getvalue())


main()
