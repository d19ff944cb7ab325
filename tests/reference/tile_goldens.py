"""Makes tests/golden/tiles.json with Pillow and transformers' slow LlavaOnevision processor: pip install pillow==11.3.0 transformers==4.45.2 torch numpy.
Pictures are not stored: both sides draw pixel (x, y, c) of a W x H picture by the same integer formula."""
import hashlib, json, os
import numpy as np
from PIL import Image
from transformers import LlavaOnevisionImageProcessor
from transformers.image_transforms import resize

def picture(w, h):
    y, x, c = np.meshgrid(np.arange(h), np.arange(w), np.arange(3), indexing="ij")
    return ((x * x * 7 + y * y * 3 + x * y * 5 + c * 91 + (x // 9 + y // 7) % 2 * 120) % 256).astype(np.uint8)

sha = lambda a: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()
out = {"resize": [], "tiles": []}
for (w, h), (W, H) in [((64, 48), (112, 112)), ((301, 77), (112, 112)), ((5, 3), (40, 50)), ((1, 1), (14, 14)),
                       ((640, 480), (336, 252)), ((113, 999), (38, 336)), ((50, 50), (50, 20)), ((50, 50), (20, 50)), ((333, 222), (1, 1))]:
    for f in (2, 3):
        out["resize"].append([w, h, W, H, f, sha(np.asarray(Image.fromarray(picture(w, h)).resize((W, H), f)))])
pins = [[112 * a, 112 * b] for a in (1, 2, 3) for b in (1, 2, 3)]
p = LlavaOnevisionImageProcessor(size={"height": 112, "width": 112}, image_grid_pinpoints=pins, image_mean=[.5] * 3, image_std=[.5] * 3, resample=3)
for w, h in [(112, 112), (100, 100), (640, 480), (480, 640), (1000, 90), (90, 1000), (7, 5), (336, 336), (301, 200), (224, 112), (230, 119)]:
    patches = p.get_image_patches(picture(w, h), pins, (112, 112), 112, 3, "channels_last", "channels_last")
    # preprocess() resizes every patch: it changes only the ragged ones of an odd margin
    patches = np.stack([resize(np.asarray(t), (112, 112), resample=3, input_data_format="channels_last") for t in patches])
    out["tiles"].append([w, h, len(patches), sha(patches)])
here = os.path.dirname(os.path.abspath(__file__))
json.dump(out, open(os.path.join(here, "../golden/tiles.json"), "w"), indent=0)
print(len(out["resize"]), len(out["tiles"]))
