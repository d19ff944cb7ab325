"""Writes tests/golden/importance.json: per linear of the tiny LLaVA-OneVision of $MBQ_SHARED/oracle, the mean of x^2 over
the vision and answer tokens of its dumped batch, each token alike and vision tokens at 0.25; every 16th channel.

    python tests/reference/importance_goldens.py $MBQ_SHARED      (torch 2.5.1, transformers 4.45.2, safetensors)
"""
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import LlavaOnevisionForConditionalGeneration

root = pathlib.Path(sys.argv[1]) / "oracle/tiny-onevision"
model = LlavaOnevisionForConditionalGeneration.from_pretrained(
    root / "model", torch_dtype=torch.float32, attn_implementation="eager"
).eval()
decoder = model.language_model
PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}
batch = load_file(root / "runs/batch.safetensors")
vision, answer = batch["vision_mask"].bool(), batch["caption_mask"].bool()
inputs = {}


def keep(name):
    return lambda module, args: inputs.__setitem__(name, args[0].double())


for name, module in decoder.model.named_modules():
    if isinstance(module, torch.nn.Linear):
        module.register_forward_pre_hook(keep(f"blk.{name.split('.')[1]}.{PARTS[name.split('.')[-1]]}.weight"))
with torch.no_grad():
    decoder(inputs_embeds=batch["inputs_embeds"].float(), attention_mask=batch["attention_mask"])
golden = {}
for name, x in inputs.items():
    weigh = lambda r: ((answer + r * vision.double())[..., None] * x**2).sum((0, 1)) / (answer.sum() + r * vision.sum())
    golden[name] = {"image": weigh(1.0)[::16].tolist(), "quarter": weigh(0.25)[::16].tolist()}
out = pathlib.Path(__file__).parents[1] / "golden/importance.json"
out.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")
