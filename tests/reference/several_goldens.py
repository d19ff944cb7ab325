"""Makes tests/golden/onevision-several.json: what a prompt with several pictures shows the text model, by transformers'
LlavaOnevision (float32, Pillow image processor). pip install transformers==5.24.0 torch pillow
Argument: the tiny-onevision checkpoint."""
import base64, json, os, sys
import numpy as np, torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

here = os.path.dirname(os.path.abspath(__file__))
names = ["wide", "tall", "odd-row", "square"]
images = [Image.open(os.path.join(here, f"../golden/pictures/{n}.png")).convert("RGB") for n in names]
processor = LlavaOnevisionImageProcessorPil.from_pretrained(sys.argv[1])
model = LlavaOnevisionForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
x = processor(images=[images], return_tensors="pt")
print({k: getattr(v, "shape", v) for k, v in x.items()})
with torch.no_grad():
    out = model.get_image_features(x["pixel_values"], x["image_sizes"], batch_num_images=torch.as_tensor(x["batch_num_images"]))
features = getattr(out, "pooler_output", out)
features = list(features) if isinstance(features, (list, tuple)) else [features]
print([f.shape for f in features])
features = torch.cat(features).reshape(len(names), -1, features[0].shape[-1]).numpy().astype("<f4")
golden = {n: {"tokens": len(f), "values": base64.b64encode(f.ravel()[::7].tobytes()).decode(), "norm": float(np.linalg.norm(f.astype(float)))}
          for n, f in zip(names, features)}
json.dump(golden, open(os.path.join(here, "../golden/onevision-several.json"), "w"))
print({n: (g["tokens"], g["norm"]) for n, g in golden.items()})
