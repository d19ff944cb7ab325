"""Makes tests/golden/anyres.json with transformers' own functions: for every picture up to 800 x 800, the grid, the part
of it that is kept, and the tokens. pip install transformers==5.24.0 torch pillow"""
import json, math, os
from types import SimpleNamespace
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor as Processor

def plan(w, h, side, grid, pins, cache={}):
    """[rows of tiles, columns of tiles, first token row, rows, first token column, columns, picture tokens]"""
    rows, cols = get_anyres_image_grid_shape((h, w), pins, side)
    whole = cache.setdefault((rows, cols, grid), torch.empty(1, rows * grid, cols * grid))
    kept = unpad_image(whole, (h, w))
    top, left = divmod(kept.storage_offset(), cols * grid) if kept.numel() else (0, 0)
    me = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=pins), num_image_tokens=grid * grid,
                         vision_aspect_ratio="anyres_max_9")
    me._get_unpadded_features = lambda *a: Processor._get_unpadded_features(me, *a)
    return [rows, cols, top, kept.shape[1], left, kept.shape[2], Processor._get_number_of_features(me, h, w, side, side)]

def fnv(numbers):
    """FNV-1a, 64 bits, over the numbers as 4 bytes each, lowest first."""
    x = 0xCBF29CE484222325
    for n in numbers:
        for b in n.to_bytes(4, "little"):
            x = (x ^ b) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{x:016x}"

out = []
for side, grid, n in [(112, 8, 3), (384, 27, 6)]:
    pins = [[side * a, side * b] for a in range(1, n + 1) for b in range(1, n + 1)]
    p = lambda w, h: plan(w, h, side, grid, pins)
    some = [(1024, 899), (188, 423), (423, 188), (1, 800), (800, 1), (1, 1), (4032, 3024), (3024, 4032), (2304, 2304), (10000, 37), (639, 481)]
    out.append({"side": side, "grid": grid, "pinpoints": n, "rows": [fnv(v for w in range(1, 801) for v in p(w, h)) for h in range(1, 801)],
                "some": [[w, h, *p(w, h)] for w, h in some]})
    print(out[-1]["some"])
here = os.path.dirname(os.path.abspath(__file__))
json.dump(out, open(os.path.join(here, "../golden/anyres.json"), "w"))
