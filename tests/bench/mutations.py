"""What mutants.py does to files: JSON, safetensors, GGUF, protobuf, zip and pickle, templates, pictures, by their fields."""
import hashlib, io, json, os, re, struct, zipfile
from pathlib import Path

LONG = "long " * 20000
STRANGE = ["", " ", "\0", "\u202e\ufeff", "../../etc/passwd", "/dev/zero", "%s%n{{}}", "é" * 300, "\ud7ff\U0010ffff", "NaN", "-1", "1e999"]
NUMBERS = [0, 1, -1, 2, 3, 7, 127, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1,
           2**64, 10**40, 0.5, -0.5, 1e-45, 1e38, 1e39, 1e308, -1e308, 1e-300]
JINJA = ["{% for i in range(1000000000) %}x{% endfor %}", "{{ 'x' * 1000000000 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
         "{% include 'chat_template.jinja' %}", "{{ ''.__class__.__mro__ }}", "{{ messages[0].content[99].text.x.y }}", "{% if %}",
         "{{ '%999999999d' % 5 }}", "{{ 1 // 0 }}", "{{ 9999999999999999999999 ** 99999 }}", "{{ raise_exception('no') }}", "{" * 5000,
         "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{% for a in messages %}" * 400, "{{ range(10**12) | list | length }}",
         "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
         "{{ messages | tojson(indent=100000000) }}", "{{ 'a' | center(1000000000) }}", "{{ strftime_now('%Y' * 9999) }}", ""]


def link(source, target):
    """A folder of the same files, which are replaced, never changed in place."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            os.symlink(path.resolve(), target / path.name)


def replace(target, data):
    target.unlink(missing_ok=True)
    target.write_bytes(data)


def digest(folder):
    """Of each output, without what differs from run to run."""
    result = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix == ".gguf":
            result[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return result


def pick_file(rng, checkpoint):
    """A file of a checkpoint; the small ones, where meaning is, more often than the weights."""
    names = sorted(p.name for p in checkpoint.iterdir() if p.is_file())
    weight = {"config.json": 6, "tokenizer.json": 3, "preprocessor_config.json": 3, "processor_config.json": 3}
    return rng.choices(names, [weight.get(n, 2 if n.endswith((".safetensors", ".bin", ".model")) else 1) for n in names])[0]


def relatives(name):
    """Other files that an error may rightly name in place of a damaged one."""
    shard = re.sub(r"-\d+-of-\d+", "", name)
    return ["tokenizer", "preprocessor", "processor"] if "token" in name or "vocab" in name or "merges" in name else [shard]


def mutate_file(rng, source, target):
    """Writes a mutant of `source` to `target`; returns what was done."""
    data = source.read_bytes()
    kinds = {".json": json_file, ".jsonl": json_lines, ".safetensors": safetensors, ".gguf": gguf, ".model": protobuf, ".bin": archive,
             ".jinja": template}
    mutate = kinds.get(source.suffix, raw)
    if rng.random() < 0.06:
        mutate = raw
    what, data = mutate(rng, data)
    replace(target, data)
    return what


# Bytes without a known meaning.


def raw(rng, data):
    kind = rng.choice(["cut", "empty", "flip", "flip", "flip", "bytes", "bytes", "insert", "remove", "double", "zeros", "number", "number"])
    at = rng.randrange(max(1, min(len(data), rng.choice([16, 64, 512, 1 << 30]))))
    if kind == "cut":
        return f"cut at {at}", data[:at]
    if kind == "empty":
        return "emptied", b""
    if kind == "flip":
        out = bytearray(data or b"\0")
        out[at] ^= 1 << rng.randrange(8)
        return f"bit of byte {at} flipped", bytes(out)
    if kind == "bytes":
        out = bytearray(data)
        for _ in range(rng.choice([1, 4, 16])):
            if out:
                out[rng.randrange(max(1, min(len(out), at * 2)))] = rng.choice([0, 0xff, 0x7f, 0x80, rng.randrange(256)])
        return f"bytes up to {at * 2} changed", bytes(out)
    if kind == "insert":
        return f"bytes put in at {at}", data[:at] + rng.randbytes(rng.choice([1, 8, 1000])) + data[at:]
    if kind == "remove":
        return f"bytes removed at {at}", data[:at] + data[at + rng.choice([1, 2, 8, 100]):]
    if kind == "double":
        return "doubled", data + data
    if kind == "zeros":
        return f"zeros from {at}", data[:at] + bytes(len(data) - at)
    number = rng.choice(NUMBERS[:18]) & 0xffffffff
    form = rng.choice("<>") + rng.choice("HI")
    out = bytearray(data)
    packed = struct.pack(form, number & (0xffff if form[1] == "H" else 0xffffffff))
    out[at:at + len(packed)] = packed
    return f"{number} as {form} at {at}", bytes(out)


# JSON.


def places(value, path=()):
    """Paths of values; of a long container only a few children, so that a vocabulary does not drown the rest."""
    yield path
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if len(children) > 60:
        children = [children[i] for i in (0, 1, 2, len(children) // 2, len(children) - 2, len(children) - 1)]
    for key, child in children:
        yield from places(child, (*path, key))


def other_value(rng, value):
    """A value in place of `value`, and what was done."""
    if isinstance(value, bool):
        new = rng.choice([not value, not value, not value, None, str(value).lower(), 0, 1, [value], 2])
    elif isinstance(value, (int, float)):
        near = [value + 1, value - 1, value * 2, value / 2, -value, value * 1000, value // 2 if isinstance(value, int) else value / 3]
        new = rng.choice([rng.choice(near), rng.choice(near), rng.choice(NUMBERS), rng.choice([None, str(value), "x", [], [value], {}, True,
                          float("nan"), float("inf")])])
    elif isinstance(value, str):
        new = rng.choice([rng.choice(STRANGE), value + "x", value[:-1], value.upper(), LONG, None, 0, -1, 1.5, [], [value], {}, {"type": value},
                          True, rng.choice(JINJA) if "{" in value else "default"])
    elif value is None:
        new = rng.choice([0, 1, -1, 2.5, "x", [], {}, True, False, "default", {"rope_type": "yarn", "factor": 4.0}])
    elif isinstance(value, list):
        turned = list(value)
        rng.shuffle(turned)
        new = rng.choice([[], None, 0, "x", {}, value[:-1], value + value[-1:], value + [None], turned, [[]] * 3, value * 2,
                          {str(i): v for i, v in enumerate(value)}, nested(600), [1e400] * 3])
    else:
        new = rng.choice([{}, None, 0, "x", [], [value], {"a": value}, nested(600), True])
    text = json.dumps(new)
    return f"{json.dumps(value)[:40]} -> {text[:60]}", new


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def json_mutant(rng, value):
    """A mutant of a JSON value."""
    all_places = list(places(value))
    path = rng.choice(all_places[1:] or all_places)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    name = ".".join(map(str, path))
    if not path:
        what, new = other_value(rng, value)
        return f"whole: {what}", new
    kind = rng.choice(["value"] * 7 + ["remove", "remove", "rename", "copy", "add"])
    if kind == "remove":
        del holder[path[-1]]
        return f"{name} removed", value
    if kind == "rename" and isinstance(holder, dict):
        new = rng.choice([path[-1] + "_", path[-1].upper(), rng.choice(STRANGE), path[-1][:-1]])
        holder[new] = holder.pop(path[-1])
        return f"{name} renamed {new[:30]!r}", value
    if kind == "copy":
        target = rng.choice(all_places[1:])
        other = value
        for key in target[:-1]:
            other = other[key]
        other[target[-1]] = json.loads(json.dumps(holder[path[-1]]))
        return f"{name} copied over {'.'.join(map(str, target))}", value
    if kind == "add" and isinstance(holder, dict):
        key = rng.choice(["quantization_config", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "num_experts", "auto_map",
                          "attention_bias", "mlp_bias", "head_dim", "logit_scale", "transformers_weights", "vision_feature_layer", "adapter"])
        holder[key] = rng.choice([1, True, "x", [0], {"type": "yarn", "factor": 2.0}, 0.5])
        return f"{name} beside it {key}: {holder[key]}", value
    what, holder[path[-1]] = other_value(rng, holder[path[-1]])
    return f"{name}: {what}", value


def json_file(rng, data):
    if rng.random() < 0.12:
        return json_text(rng, data)
    what, value = json_mutant(rng, json.loads(data))
    return what, json.dumps(value).encode("utf-8", "surrogatepass")


def json_text(rng, data):
    """What a JSON value cannot say."""
    first = data.index(b"{") + 1 if b"{" in data else 0
    key = re.findall(rb'"(\w+)"\s*:', data)
    key = rng.choice(key[:200]) if key else b"a"
    return rng.choice([("deep arrays", b"[" * 100000), ("deep objects", b'{"a":' * 100000), ("a byte order mark", b"\xef\xbb\xbf" + data),
                       ("a key twice", data[:first] + b'"' + key + b'": 7, ' + data[first:]),
                       ("NaN", data[:first] + b'"' + key + b'": NaN, ' + data[first:]), ("not UTF-8", data[:first] + b'"\xff\xfe": 1, ' + data[first:]),
                       ("a surrogate", data[:first] + b'"x": "\\ud800", ' + data[first:]), ("text behind it", data + b"]"),
                       ("cut", data[:rng.randrange(len(data) + 1)]), ("UTF-16", data.decode("utf-8", "replace").encode("utf-16")),
                       ("a long number", data[:first] + b'"' + key + b'": ' + b"9" * 100000 + b", " + data[first:]), ("null", b"null"), ("a string", b'"x"'),
                       ("white space", b" " * 1000000)])


def json_lines(rng, data):
    lines = data.splitlines()
    at = rng.randrange(min(len(lines), 2))
    kind = rng.random()
    if kind < 0.1:
        return raw(rng, data)
    if kind < 0.2:
        what, lines[at] = json_text(rng, lines[at])
    else:
        what, value = json_mutant(rng, json.loads(lines[at]))
        lines[at] = json.dumps(value).encode()
    return f"line {at + 1}: {what}", b"\n".join(lines)


# safetensors.


def safetensors(rng, data):
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    kind = rng.random()
    if kind < 0.1:
        new = rng.choice([0, 1, size - 1, size + 1, len(data), 2**32, 2**63, 2**64 - 1, 100_000_001])
        return f"header's size {new}", struct.pack("<Q", new) + data[8:]
    if kind < 0.2:
        cut = rng.randrange(len(data))
        return rng.choice([(f"cut at {cut}", data[:cut]), ("bytes behind it", data + bytes(100)), ("no data", data[:8 + size])])
    if kind < 0.3:
        out, at = bytearray(data), 8 + size + rng.randrange(len(body) // 4) * 4
        out[at:at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\xc0\x7f\xc0\x7f", b"\x80\x7f\x80\x7f", b"\xff" * 4, b"\0\x7c\0\x7c"])
        return f"not a number at {at}", bytes(out)
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    if kind < 0.55:
        key = rng.choice(["dtype", "shape", "data_offsets"])
        if key == "dtype":
            entry[key] = rng.choice(["F32", "F16", "F64", "I8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "bf16", "", "U16", 3, None])
        elif key == "shape":
            s = entry[key]
            entry[key] = rng.choice([s[::-1], s[:-1], s + [1], [1] + s, [0] + s, [2**63, 2], [2**32] * 2 + s, [-1] + s[1:], [], [s[0] * 2] + s[1:],
                                     [s[0] // 2] + s[1:], [1.5], None, "x", [2**64 - 1]])
        else:
            a, b = entry[key]
            entry[key] = rng.choice([[a, b + 2], [a + 2, b], [b, a], [a, a], [0, b - a], [a, 2**63], [2**64 - 1, 2**64 - 1], [-1, b], [a], [a, b, b],
                                     header[rng.choice(names)][key], None, [a + 0.5, b]])
        what = f"{name}.{key}: {str(entry[key])[:60]}"
    elif kind < 0.65:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
        what = f"{name} and {other} exchanged"
    elif kind < 0.8:
        what, value = json_mutant(rng, header)
        header = value
    elif kind < 0.9:
        new = rng.choice([name + ".x", name.replace("0", "7"), name.replace("weight", "bias"), name.replace("weight", "weight_scale"), "", LONG, "\0",
                          name.replace("q_proj", "lora_A"), name.replace("weight", "qweight")])
        header[new] = header.pop(name)
        what = f"{name} renamed {new[:60]!r}"
    else:
        text = json.dumps(header).replace("{", "{" + json.dumps(name) + ":" + json.dumps(entry) + ",", 1)
        out = text.encode()
        return f"{name} twice", struct.pack("<Q", len(out)) + out + body
    out = json.dumps(header).encode()
    return what, struct.pack("<Q", len(out)) + out + body


# GGUF. A header is a list of pieces, each bytes; a mutation replaces pieces.

WIDTHS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}


class Gguf:
    """A GGUF file in parts: `pairs` of (key, type, value bytes), `tensors` of [name, dims, type, offset], the data."""

    def __init__(self, data):
        self.data, self.at = data, 4
        self.version, tensors, pairs = self.take("<I"), self.take("<Q"), self.take("<Q")
        self.pairs, self.tensors = [], []
        for _ in range(pairs):
            key, kind = self.text(), self.take("<I")
            begin = self.at
            self.skip(kind)
            self.pairs.append([key, kind, data[begin:self.at]])
        for _ in range(tensors):
            name = self.text()
            dims = [self.take("<Q") for _ in range(self.take("<I"))]
            self.tensors.append([name, dims, self.take("<I"), self.take("<Q")])
        self.body = data[(self.at + 31) // 32 * 32:]
        self.counts = None

    def take(self, form):
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def text(self):
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size:self.at]

    def skip(self, kind):
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.take("<I"), self.take("<Q")
            if inner == 8:
                for _ in range(count):
                    self.text()
            else:
                self.at += struct.calcsize(WIDTHS[inner]) * count
        else:
            self.at += struct.calcsize(WIDTHS[kind])

    def bytes(self):
        tensors, pairs = self.counts or (len(self.tensors), len(self.pairs))
        out = [b"GGUF", struct.pack("<IQQ", self.version & 0xffffffff, tensors, pairs)]
        for key, kind, value in self.pairs:
            out.append(string(key) + struct.pack("<I", kind) + value)
        for name, dims, kind, offset in self.tensors:
            dims = b"".join(struct.pack("<Q", d & (2**64 - 1)) for d in dims)
            out.append(string(name) + struct.pack("<I", len(dims) // 8) + dims + struct.pack("<IQ", kind & 0xffffffff, offset & (2**64 - 1)))
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.body


def string(data):
    return struct.pack("<Q", len(data)) + data


def packed(rng, kind):
    """A value of a number's type, as bytes."""
    if kind in (6, 12):
        return struct.pack(WIDTHS[kind], rng.choice([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1e38, 0.5, 1e6]))
    if kind == 7:
        return bytes([rng.choice([0, 1, 2, 255])])
    bits = 8 * struct.calcsize(WIDTHS[kind])
    value = rng.choice([0, 1, 2, 3, 5, 7, 14, 64, 100, 255, 1000, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) % 2**bits
    return value.to_bytes(bits // 8, "little")


def gguf_value(rng, kind, value):
    """Another value for a key: of its own type, or of another."""
    if rng.random() < 0.25:
        kind = rng.choice([0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 255])
        if kind == 8:
            return kind, string(rng.choice(STRANGE + ["clip", "llama", "1"]).encode("utf-8", "replace"))
        if kind == 9:
            inner = rng.choice([4, 5, 6, 7, 8, 9, 13])
            count = rng.choice([0, 1, 3, 2**32, 2**61, 2**64 - 1])
            return kind, struct.pack("<IQ", inner, count) + bytes(64)
        return kind, packed(rng, kind) if kind in WIDTHS else bytes(8)
    if kind == 8:
        text = value[8:]
        known = [b"clip", b"llama", b"qwen2", b"gemma3", b"qwen2vl", b"gpt2", b"bert", b"none", b"mlp", b"ldp", b"resampler", b"gemma3", b"pixtral",
                 b"qwen2.5vl_merger", b"idefics3", b"internvl", b"spatial_unpad", b"flat", b"gelu", b"default", b"qwen2-vl", b"t5", b"mamba",
                 b"llava_onevision", b"yarn", b"linear", b"ultravox", b"glm_edge", b"minicpmv", b"llama4", b"kimivl", b"lightonocr"]
        return kind, rng.choice([string(rng.choice(known)), string(rng.choice(STRANGE + JINJA + [LONG]).encode("utf-8", "replace")), string(text + b"x"),
                                 string(text[:-1]), string(b"\xff\xfe" + text), struct.pack("<Q", rng.choice([2**63, 2**64 - 1, len(text) + 9])) + text])
    if kind == 9:
        inner, count = struct.unpack("<IQ", value[:12])
        rest = value[12:]
        if inner != 8 and rng.random() < 0.6:
            width = struct.calcsize(WIDTHS[inner])
            n = rng.choice([count, count, max(0, count - 1), count + 1, 0, 1, 600])
            cells = [rest[i:i + width] for i in range(0, len(rest), width)][:n]
            cells += [packed(rng, inner)] * (n - len(cells))
            if cells and rng.random() < 0.7:
                cells[rng.randrange(len(cells))] = packed(rng, inner)
            return kind, struct.pack("<IQ", inner, len(cells)) + b"".join(cells)
        if inner == 8 and rng.random() < 0.7:
            texts, at = [], 0
            for _ in range(count):
                size = struct.unpack_from("<Q", rest, at)[0]
                texts.append(rest[at + 8:at + 8 + size])
                at += 8 + size
            change = rng.choice(["drop", "twice", "change", "change", "none", "swap", "cut"])
            at = rng.randrange(len(texts)) if texts else 0
            if change == "drop" and texts:
                del texts[at]
            elif change == "twice" and texts:
                texts[at] = texts[at // 2]
            elif change == "change" and texts:
                texts[at] = rng.choice([b"", b"\xff", b"<|im_end|>", b"a" * 1000, b" ", b"\n", b"x y z", b"\0", b"\xe2\x96\x81"])
            elif change == "none":
                texts = []
            elif change == "swap":
                rng.shuffle(texts)
            else:
                texts = texts[:rng.randrange(len(texts) + 1)]
            return kind, struct.pack("<IQ", 8, len(texts)) + b"".join(map(string, texts))
        return kind, struct.pack("<IQ", rng.choice([inner, 4, 8, 9, 99]), rng.choice([0, count, count - 1, count + 1, 2**32, 2**63])) + rest
    if rng.random() < 0.5 and kind not in (6, 7, 12):
        old = int.from_bytes(value, "little")
        new = rng.choice([old + 1, old - 1, old * 2, old // 2, old * 3, 3]) % 2 ** (8 * len(value))
        return kind, new.to_bytes(len(value), "little")
    return kind, packed(rng, kind)


def shown(pair):
    key, kind, value = pair
    text = struct.unpack(WIDTHS[kind], value)[0] if kind in WIDTHS else value[:40]
    return f"{key.decode('utf-8', 'replace')} = {text} ({kind})"


def gguf(rng, data):
    file = Gguf(data)
    part = rng.random()
    if part < 0.55:
        at = rng.randrange(len(file.pairs))
        kind = rng.choice(["value"] * 8 + ["remove", "remove", "twice", "rename", "add"])
        pair = file.pairs[at]
        if kind == "value":
            before = shown(pair)
            pair[1:] = gguf_value(rng, pair[1], pair[2])
            try:
                what = f"{before} -> {shown(pair)}"
            except struct.error:
                what = f"{before} -> type {pair[1]}"
        elif kind == "remove":
            what = f"{shown(file.pairs.pop(at))} removed"
        elif kind == "twice":
            file.pairs.insert(rng.randrange(len(file.pairs)), list(pair))
            what = f"{shown(pair)} twice"
        elif kind == "rename":
            what = f"{shown(pair)} renamed"
            pair[0] = rng.choice([pair[0] + b"x", b"", b"\xff", b"a" * 70000, pair[0].upper()])
        else:
            key, value = rng.choice([(b"general.alignment", 0), (b"general.alignment", 7), (b"general.alignment", 2**31), (b"general.alignment", 1),
                                     (b"split.count", 3), (b"split.count", 65535), (b"general.alignment", 64), (b"clip.has_audio_encoder", 1)])
            file.pairs.append([key, 4, struct.pack("<I", value)])
            what = f"{key.decode()} = {value} added"
    elif part < 0.88 and file.tensors:
        at = rng.randrange(len(file.tensors))
        tensor = file.tensors[at]
        name = tensor[0].decode()
        kind = rng.choice(["dims"] * 4 + ["type"] * 3 + ["offset"] * 3 + ["name", "remove", "twice", "swap", "add"])
        if kind == "dims":
            d, i = list(tensor[1]), rng.randrange(len(tensor[1]))
            new = rng.choice([0, 1, 2, d[i] + 1, d[i] - 1, d[i] * 2, d[i] // 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 256])
            tensor[1] = rng.choice([d[:i] + [new] + d[i + 1:], d[:i] + [new] + d[i + 1:], d[::-1], [*d, 1], d[:-1], [], [1] * 5, [2**32, 2**32], [d[0] * d[-1]], [d[0], 1]])
            what = f"{name}: {d} -> {tensor[1]}"
        elif kind == "type":
            new = rng.choice([0, 1, 2, 3, 6, 8, 10, 12, 14, 16, 24, 26, 28, 30, 31, 36, 39, 40, 41, 42, 43, 100, 2**31, 2**32 - 1])
            what, tensor[2] = f"{name}: type {tensor[2]} -> {new}", new
        elif kind == "offset":
            old = tensor[3]
            tensor[3] = rng.choice([0, old + 1, old + 32, old - 32, old + 2**32, 2**63, 2**64 - 1, 2**64 - 32, len(file.body) - 32, rng.choice(file.tensors)[3]])
            what = f"{name}: offset {old} -> {tensor[3]}"
        elif kind == "name":
            tensor[0] = rng.choice([b"", tensor[0] + b"x", b"\xff", b"n" * 64, b"n" * 5000, tensor[0].replace(b"0", b"9"), tensor[0].replace(b"weight", b"bias")])
            what = f"{name} renamed {tensor[0][:40]}"
        elif kind == "remove":
            del file.tensors[at]
            what = f"{name} removed"
        elif kind == "twice":
            file.tensors.append(list(tensor))
            what = f"{name} twice"
        elif kind == "swap":
            other = rng.choice(file.tensors)
            tensor[0], other[0] = other[0], tensor[0]
            what = f"{name} and {tensor[0].decode()} exchanged"
        else:
            file.tensors.append([rng.choice([b"blk.99.attn_q.weight", b"rope_freqs.weight", b"v.blk.0.ffn_gate.weight", b"x"]), [32], 0, 0])
            what = f"{file.tensors[-1][0].decode()} added"
    elif part < 0.94:
        tensors, pairs = len(file.tensors), len(file.pairs)
        kind = rng.random()
        if kind < 0.3:
            file.version = rng.choice([0, 1, 2, 4, 2**31, 0x03000000])
            return f"version {file.version}", file.bytes()
        file.counts = rng.choice([(tensors + 1, pairs), (tensors - 1, pairs), (2**63, pairs), (2**64 - 1, pairs), (0, pairs), (tensors, pairs + 1),
                                  (tensors, pairs - 1), (tensors, 0), (tensors, 2**64 - 1), (0, 0)])
        what = f"counts {file.counts}"
    else:
        body = bytearray(file.body)
        at = rng.randrange(len(body))
        new = rng.choice([b"\xff" * 4, b"\0\x7e" * 2, b"\0\0\xc0\x7f", b"\0\xfc", b"\xff" * 64, b"\0" * 256])
        body[at:at + len(new)] = new
        file.body = bytes(body[:at] if rng.random() < 0.3 else body)
        what = f"data at {at}: {new[:4].hex()}, {len(file.body)} bytes"
    return what, file.bytes()


# Protobuf (tokenizer.model).


def varint(n):
    out = bytearray()
    n &= 2**64 - 1
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def fields(data):
    """(number, wire type, bytes) of each field."""
    at, out = 0, []

    def number():
        nonlocal at
        n = shift = 0
        while True:
            byte = data[at]
            at += 1
            n |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return n

    while at < len(data):
        tag = number()
        begin = at
        if tag & 7 == 0:
            number()
        elif tag & 7 == 2:
            size = number()
            begin, at = at, at + size
        else:
            at += {1: 8, 5: 4}[tag & 7]
        out.append([tag >> 3, tag & 7, data[begin:at]])
    return out


def message(fields):
    return b"".join(varint(n << 3 | t) + (varint(len(d)) if t == 2 else b"") + d for n, t, d in fields)


def protobuf(rng, data, depth=0):
    if rng.random() < 0.15:
        return raw(rng, data)
    parts = fields(data)
    at = rng.choice([0, 1, 2, len(parts) - 1, len(parts) - 2, rng.randrange(len(parts))]) if len(parts) > 2 else 0
    number, wire, value = parts[at]
    if depth == 0 and wire == 2 and value and rng.random() < 0.7:
        try:
            what, parts[at][2] = protobuf(rng, value, 1)
            return f"field {number} ({at}): {what}", message(parts)
        except (IndexError, KeyError):
            pass
    kind = rng.choice(["value"] * 4 + ["remove", "twice", "number", "wire", "length"])
    if kind == "remove":
        del parts[at]
    elif kind == "twice":
        parts.insert(at, parts[at])
    elif kind == "number":
        parts[at][0] = rng.choice([0, 1, 2, 3, 536870911])
    elif kind == "wire":
        parts[at][1] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7])
    elif kind == "length":
        begin = message(parts[:at]) + varint(number << 3 | 2) + varint(rng.choice([2**63, 2**64 - 1, 2**32, len(value) + 1000]))
        return f"field {number} ({at}): length", begin + value + message(parts[at + 1:])
    elif wire == 0:
        parts[at][2] = rng.choice([varint(n) for n in (0, 1, 2, 3, 6, 99, 2**31, 2**32, 2**64 - 1)] + [b"\xff" * 10, b"\xff" * 11 + b"\1"])
    elif wire == 5:
        parts[at][2] = struct.pack("<f", rng.choice([0.0, -1.0, float("nan"), float("inf"), -1e38]))
    else:
        parts[at][2] = rng.choice([b"", b"\xff\xfe", b"a" * 100000, b"\0", value + b"x", value[:-1], bytes(len(value))])
    return f"field {number} ({at}) {kind}", message(parts)


# PyTorch's zip of a pickle.


def archive(rng, data):
    if rng.random() < 0.3 or not zipfile.is_zipfile(io.BytesIO(data)):
        return raw(rng, data)
    source = zipfile.ZipFile(io.BytesIO(data))
    entries = [[i.filename, source.read(i)] for i in source.infolist()]
    at = next(i for i, e in enumerate(entries) if e[0].endswith("data.pkl"))
    kind = rng.choice(["pickle"] * 6 + ["name", "remove", "twice", "cut", "deflate", "bomb"])
    method = zipfile.ZIP_STORED
    what = kind
    if kind == "pickle":
        body = bytearray(entries[at][1])
        for _ in range(rng.choice([1, 1, 2, 4])):
            i = rng.randrange(len(body))
            choice = rng.random()
            if choice < 0.5:
                body[i] = rng.choice(b"().0123FIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x85\x86\x87\x8a\x8b\x8c\x90\x93\x94\x95\xff\0")
            elif choice < 0.7:
                del body[i:i + rng.choice([1, 2, 9])]
            elif choice < 0.85:
                body[i:i] = rng.choice([b"cos\nsystem\n", b"(" * 100000, b"]" * 1000, b"J\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x8a\xff" + b"\xff" * 255, b"2" * 5000, b"h\0" * 3000])
            else:
                body[i] ^= 1 << rng.randrange(8)
        entries[at][1] = bytes(body)
    elif kind == "name":
        i = rng.randrange(len(entries))
        entries[i][0] = rng.choice(["../../x", "/etc/x", "", "archive/data/0", "archive/data.pkl", "a" * 60000])
        what = f"{i} renamed {entries[i][0][:20]}"
    elif kind == "remove":
        what = f"{entries.pop(rng.randrange(len(entries)))[0]} removed"
    elif kind == "twice":
        entries.append(list(rng.choice(entries)))
    elif kind == "cut":
        i = rng.randrange(len(entries))
        entries[i][1] = entries[i][1][:len(entries[i][1]) // 2]
        what = f"{entries[i][0]} cut"
    elif kind == "deflate":
        method = zipfile.ZIP_DEFLATED
    else:
        method = zipfile.ZIP_DEFLATED
        entries[at][1] = bytes(1 << 28)
    import warnings
    warnings.simplefilter("ignore")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as target:
        for name, body in entries:
            target.writestr(name, body)
    return what, out.getvalue()


def template(rng, data):
    text = data.decode()
    kind = rng.random()
    if kind < 0.4:
        bad = rng.choice(JINJA)
        return f"template {bad[:40]!r}", bad.encode()
    if kind < 0.7:
        bad, at = rng.choice(JINJA), rng.randrange(len(text) + 1)
        return f"template with {bad[:40]!r} at {at}", (text[:at] + bad + text[at:]).encode()
    return raw(rng, data)
