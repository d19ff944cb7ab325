"""towers.py mmproj FAMILY WIDTH OUT.gguf      a vision file in a published shape, random f16 weights
towers.py time FAMILY WIDTH UNITS...          the same tower and projector in PyTorch, f16, milliseconds

FAMILY: qwen2vl (Qwen2-VL's tower of 32 blocks, 1280 wide) or internvl (InternViT-300M, 24 blocks, 1024 wide); WIDTH is the text model's.
UNITS: patches as ROWSxCOLUMNS (qwen2vl) or a number of tiles of 448 pixels (internvl). mmproj needs numpy, time torch and transformers.
BLOCKS=n in the environment makes fewer blocks.
"""
import os
import struct
import sys

FAMILIES = {
    "qwen2vl": dict(width=1280, inner=5120, blocks=32, heads=16, patch=14, side=560, merge=2, eps=1e-6),
    "internvl": dict(width=1024, inner=4096, blocks=24, heads=16, patch=14, side=448, merge=2, eps=1e-6),
}
what, family, hidden = sys.argv[1], sys.argv[2], int(sys.argv[3])
shape = FAMILIES[family]
W, I, P, M = shape["width"], shape["inner"], shape["patch"], shape["merge"]
blocks = int(os.environ.get("BLOCKS", shape["blocks"]))

def text(s):
    return struct.pack("<Q", len(s)) + s.encode()

def mmproj(out):
    import numpy as np

    u32, f32 = (lambda v: struct.pack("<II", 4, v)), (lambda v: struct.pack("<If", 6, v))
    string, flag = (lambda v: struct.pack("<I", 8) + text(v)), (lambda v: struct.pack("<IB", 7, v))
    floats = lambda v: struct.pack("<IIQ", 9, 6, len(v)) + struct.pack(f"<{len(v)}f", *v)
    v = "clip.vision."
    metadata = {
        "general.architecture": string("clip"), "general.alignment": u32(32), "clip.has_vision_encoder": flag(1),
        "clip.projector_type": string({"qwen2vl": "qwen2vl_merger"}.get(family, family)),
        v + "image_size": u32(shape["side"]), v + "patch_size": u32(P), v + "embedding_length": u32(W),
        v + "feed_forward_length": u32(I), v + "block_count": u32(blocks), v + "attention.head_count": u32(shape["heads"]),
        v + "projection_dim": u32(hidden), v + "attention.layer_norm_epsilon": f32(shape["eps"]),
        v + "image_mean": floats([0.5] * 3), v + "image_std": floats([0.5] * 3)}
    tensors = {}  # name: shape, slowest first
    if family == "internvl":
        metadata |= {"clip.use_gelu": flag(1), v + "projector.scale_factor": u32(M)}
        tensors |= {"v.class_embd": (W,), "v.position_embd.weight": ((shape["side"] // P) ** 2 + 1, W), "v.patch_embd.bias": (W,)}
        projector = {"mm.model.mlp.0": (None, 4 * W), "mm.model.mlp.1": (hidden, 4 * W), "mm.model.mlp.3": (hidden, hidden)}
    else:
        tensors |= {"v.patch_embd.weight.1": (W, 3, P, P)}
        projector = {"v.post_ln": (None, W), "mm.0": (4 * W, 4 * W), "mm.2": (hidden, 4 * W)}
    tensors["v.patch_embd.weight"] = (W, 3, P, P)
    linears = {"attn_q": (W, W), "attn_k": (W, W), "attn_v": (W, W), "attn_out": (W, W), "ffn_up": (I, W), "ffn_down": (W, I),
               "ln1": (None, W), "ln2": (None, W)}
    for name, (rows, columns) in [(f"v.blk.{i}.{n}", s) for i in range(blocks) for n, s in linears.items()] + list(projector.items()):
        tensors[name + ".weight"] = (rows, columns) if rows else (columns,)
        tensors[name + ".bias"] = (rows or columns,)
    if family == "internvl":
        tensors |= {f"v.blk.{i}.ls{n}.weight": (W,) for i in range(blocks) for n in (1, 2)}
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(text(key) + value for key, value in metadata.items())
    half = lambda name, dims: len(dims) in (2, 4) and "position" not in name
    offset = 0
    for name, dims in tensors.items():
        kind = int(half(name, dims))
        size = 2 if kind else 4
        header += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in reversed(dims))
        header += struct.pack("<IQ", kind, offset)
        for d in dims:
            size *= d
        offset += -(-size // 32) * 32
    rng = np.random.default_rng(1)
    with open(out, "wb") as f:
        f.write(header + b"\0" * (-len(header) % 32))
        for name, dims in tensors.items():
            ones = ".ln" in name and name.endswith("weight") or ".ls" in name or "post_ln.weight" in name
            values = np.full(dims, 1.0, np.float32) if ones else rng.standard_normal(dims, np.float32) * 0.02

            data = values.astype(np.float16 if half(name, dims) else np.float32).tobytes()
            f.write(data + b"\0" * (-len(data) % 32))

def time(units):
    import torch
    from transformers.models.internvl import modeling_internvl as internvl
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2vl

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    if family == "qwen2vl":
        config = qwen2vl.Qwen2VLVisionConfig(depth=blocks, embed_dim=W, hidden_size=hidden, num_heads=shape["heads"], mlp_ratio=4)
        config._attn_implementation = "sdpa"
        tower = qwen2vl.Qwen2VisionTransformerPretrainedModel(config)
    else:
        config = internvl.InternVLConfig(
            vision_config=dict(hidden_size=W, intermediate_size=I, num_hidden_layers=blocks, num_attention_heads=shape["heads"],
                               image_size=[shape["side"]] * 2, patch_size=[P, P], attention_bias=True, use_qk_norm=False, norm_type="layer_norm"),
            text_config=dict(model_type="qwen2", hidden_size=hidden, num_hidden_layers=1, intermediate_size=64, vocab_size=320,
                             num_attention_heads=28, num_key_value_heads=4), attn_implementation="sdpa")
        tower = internvl.InternVLModel(config)
    tower = tower.to(device, dtype).eval()
    for unit in units:
        if family == "qwen2vl":
            rows, columns = map(int, unit.split("x"))
            pixels = torch.randn(rows * columns, 3 * 2 * P * P, device=device, dtype=dtype)
            grid = torch.tensor([[1, rows, columns]], device=device)
            run = lambda: tower(pixels, grid_thw=grid)
        else:
            pixels = torch.randn(int(unit), 3, shape["side"], shape["side"], device=device, dtype=dtype)
            run = lambda: tower.get_image_features(pixel_values=pixels)
        laps = []
        with torch.inference_mode():
            for call in range(13):
                if device == "cpu":
                    import time as clock
                    start = clock.perf_counter(); run(); laps.append(1000 * (clock.perf_counter() - start))
                    continue
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(); run(); end.record(); torch.cuda.synchronize()
                laps.append(start.elapsed_time(end))
        laps = sorted(laps[3:])
        print(f"{family} {unit} | {laps[len(laps) // 2]:.1f} | {laps[0]:.1f}", flush=True)

mmproj(sys.argv[4]) if what == "mmproj" else time(sys.argv[4:])
