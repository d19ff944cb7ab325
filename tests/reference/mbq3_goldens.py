"""The paper's 3-bit round-to-nearest quantiser in torch, restated; goldens and reference accuracies from it.

    python mbq3_goldens.py codes SHARED           # tests/golden/mbq3-codes.json
    python mbq3_goldens.py answers SHARED OUT [paper|mended|free]   # accuracy of the fake-quantised testbed model
    python mbq3_goldens.py groups SHARED          # mean-square error and groups without zero, by grid

`codes` hashes, for every decoder linear of the two tiny oracle models, the codes (one byte each, row by
row) and the fp16 steps; `answers` asks the testbed's questions with all decoder linears fake-quantised
(values in float32, as the authors' code does it); MBQ_DEVICE=cuda does it on a GPU, without TF32.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GROUP = 128


def quantize(w, grid="paper"):
    """w [out, in] -> codes, step [n, 1], base [n, 1] (in steps for the paper's grid), values."""
    g = w.reshape(-1, GROUP)
    high, low = g.amax(dim=1, keepdim=True), g.amin(dim=1, keepdim=True)
    step = (high - low).clamp(min=1e-5) / 7
    zero = (-torch.round(low / step)).clamp(0, 7)
    codes = torch.clamp(torch.round(g / step) + zero, 0, 7)
    values = (codes - zero) * step
    if grid != "paper":
        free_codes = torch.clamp(torch.round((g - low) / step), 0, 7)
        free = torch.full_like(low, grid == "free", dtype=torch.bool)
        if grid == "mended":
            free = (low > 0) | (high < 0)
        codes = torch.where(free, free_codes, codes)
        values = torch.where(free, free_codes * step + low, values)
    return codes, step, zero, values.reshape(w.shape)


def is_linear(name):
    return name.startswith("language_model.model.layers.") and name.endswith("_proj.weight")


def codes(shared):
    out = {}
    for model in ("tiny-onevision", "tiny-llava"):
        entry = out[model] = {}
        with safe_open(Path(shared) / "oracle" / model / "model/model.safetensors", "pt") as f:
            for name in sorted(filter(is_linear, f.keys())):
                w = f.get_tensor(name).float()
                c, step, zero, _ = quantize(w)
                sha = lambda t: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:32]
                entry[name] = {"shape": list(w.shape), "codes": sha(c.to(torch.uint8)), "steps": sha(step.half()), "zeros": sha(zero.to(torch.uint8))}
    (GOLDEN / "mbq3-codes.json").write_text(json.dumps(out, indent=0) + "\n")


def groups(shared):
    for model in ("oracle/tiny-onevision", "oracle/tiny-llava", "testbed"):
        total, one_sided, squares, power = 0, 0, dict.fromkeys(("paper", "mended", "free"), 0.0), 0.0
        with safe_open(Path(shared) / model / "model/model.safetensors", "pt") as f:
            for name in filter(is_linear, f.keys()):
                w = f.get_tensor(name).float()
                g = w.reshape(-1, GROUP)
                total += len(g)
                one_sided += int(((g.amin(1) > 0) | (g.amax(1) < 0)).sum())
                power += float(w.double().square().sum())
                for grid in squares:
                    squares[grid] += float((quantize(w, grid)[3].double() - w.double()).square().sum())
        print(model, "groups", total, "without zero", one_sided, {k: v / power for k, v in squares.items()})


def answers(shared, out, grid="paper"):
    from PIL import Image
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    testbed = Path(shared) / "testbed"
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        testbed / "model", torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(testbed / "model")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_linear(name):
                p.copy_(quantize(p.float(), grid)[3])
    torch.backends.cudnn.allow_tf32 = False  # for convolutions its default is True
    model = model.to(os.environ.get("MBQ_DEVICE", "cpu"))
    # one line per answer as it comes; a second call goes on where the first stopped
    out = Path(out)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    right = sum(d["right"] for d in done)
    for n, line in enumerate((testbed / "eval.jsonl").read_text().splitlines()):
        if n < len(done):
            continue
        q = json.loads(line)
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q["question"]}]}], add_generation_prompt=True
        )
        inputs = processor(images=Image.open(testbed / q["image"]), text=text, return_tensors="pt").to(model.device)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=64, eos_token_id=2, pad_token_id=0)
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
        right += answer == q["answer"].strip()
        with out.open("a") as f:
            f.write(json.dumps({"grid": grid, "question": n, "answer": answer, "right": answer == q["answer"].strip()}) + "\n")
        print(n + 1, right, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("codes", "groups", "answers"):
        sys.exit(__doc__)
    globals()[sys.argv[1]](*sys.argv[2:])
