"""Makes the goldens of tests/onevision_fidelity.rs, and full dumps for docs/notes/runtime-fidelity.md.

Reference: transformers 4.45.2, torch 2.5.1, Pillow 11.3.0 (13 resamples in another order), CPU, float32, eager
attention, slow (PIL) processor.

    python transformers_goldens.py pictures                  # tests/golden/pictures/*.png
    python transformers_goldens.py small  SHARED             # tests/golden/onevision.json
    python transformers_goldens.py answers SHARED            # tests/golden/testbed-answers.json
    python transformers_goldens.py dump MODEL OUT PICTURE... # OUT/<stem>.embd.f32, one file per picture
    python transformers_goldens.py logits SHARED OUT         # OUT/<n>.logits.f32, OUT/<n>.ids.i32
    python transformers_goldens.py variant MODEL OUT ROWS    # checkpoint with pinpoints up to ROWS x ROWS tiles

SHARED is the folder that holds testbed/ and oracle/tiny-onevision/. MBQ_DEVICE=cuda asks for `answers` on a GPU, in
float32 without TF32.
"""

import base64
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

assert transformers.__version__ == "4.45.2", transformers.__version__
assert int(PIL.__version__.split(".")[0]) <= 12, PIL.__version__
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
# (name, width, height): square, wide, tall, tiny, one that fits a tile exactly, odd paddings (the
# processor pads both sides alike and is then one pixel short), and one that fills 6 x 6 tiles
PICTURES = [
    ("square", 150, 150), ("wide", 301, 43), ("tall", 37, 199), ("tiny", 7, 5), ("exact", 56, 56),
    ("odd-row", 111, 72), ("odd-column", 73, 111), ("large", 340, 331), ("large-wide", 337, 230),
]
LARGE_ROWS = 6
DEVICE = os.environ.get("MBQ_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False  # for convolutions its default is True


def draw(name, width, height):
    """Noise under shapes: every resampling or re-assembly error moves many values."""
    rng = np.random.default_rng(sum(name.encode()))
    small = rng.integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        r = int(max(1, min(width, height) // 5))
        color = tuple(int(v) for v in rng.integers(0, 256, 3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x - r, y - r, x + r, y + r), fill=color)
    return image.quantize(64).convert("RGB")  # few colours: small files


def load(path):
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        path, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model.to(DEVICE), AutoProcessor.from_pretrained(path)


def prompt(processor, text):
    return processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
        add_generation_prompt=True,
    )


def embeddings(model, processor, picture):
    """Vision tokens in the order in which they enter the text model, [n, hidden]."""
    inputs = processor(images=Image.open(picture), text=prompt(processor, "x"), return_tensors="pt")
    seen = {}

    def keep(_module, _args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    handle = model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    mask = inputs["input_ids"][0] == model.config.image_token_index
    return seen["embeds"][0][mask].numpy()


def variant(source, target, rows):
    """The same weights with pinpoints up to rows x rows tiles."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    side = json.loads((source / "config.json").read_text())["vision_config"]["image_size"]
    pinpoints = [[side * h, side * w] for h in range(1, rows + 1) for w in range(1, rows + 1)]
    for file in source.iterdir():
        if not file.is_file():
            continue
        if file.name in ("config.json", "preprocessor_config.json"):
            data = json.loads(file.read_text())
            data["image_grid_pinpoints"] = pinpoints
            (target / file.name).write_text(json.dumps(data, indent=1))
        else:
            shutil.copyfile(file, target / file.name)


def small(shared):
    """Per picture: token count and 400 evenly spread values; logits of 4 prompts, the top 16."""
    source = Path(shared) / "oracle/tiny-onevision/model"
    large = Path(os.environ.get("TMPDIR", "/tmp")) / "tiny-onevision-large"
    variant(source, large, LARGE_ROWS)
    out = {"transformers": transformers.__version__, "large_rows": LARGE_ROWS, "pictures": {}, "prompts": []}
    base, wide = load(source), load(large)
    for name, *_ in PICTURES:
        model, processor = wide if name.startswith("large") else base
        embd = embeddings(model, processor, GOLDEN / "pictures" / f"{name}.png")
        step = max(1, embd.size // 400)
        values = embd.reshape(-1)[::step].astype("<f4")
        out["pictures"][name] = {
            "tokens": embd.shape[0],
            "step": step,
            "norm": float(np.linalg.norm(embd.astype(np.float64))),
            "values": base64.b64encode(values.tobytes()).decode(),
        }
    model, processor = base
    for name, text in [("square", "What is this?"), ("wide", "What color is it?"), ("tiny", "2 dogs?"), ("odd-row", "a b")]:
        inputs = processor(images=Image.open(GOLDEN / "pictures" / f"{name}.png"), text=prompt(processor, text), return_tensors="pt")
        with torch.no_grad():
            logprob = torch.log_softmax(model(**inputs).logits[0, -1].double(), -1)
        top = torch.topk(logprob, 16)
        out["prompts"].append({
            "picture": name, "text": text, "ids": int(inputs["input_ids"].shape[1]),
            "top": top.indices.tolist(), "logprob": [round(v, 7) for v in top.values.tolist()],
        })
    (GOLDEN / "onevision.json").write_text(json.dumps(out, indent=0) + "\n")


def answers(shared):
    """Greedy answers to the testbed's questions; goes on where an interrupted run stopped."""
    testbed, file = Path(shared) / "testbed", GOLDEN / "testbed-answers.json"
    model, processor = load(testbed / "model")
    out = json.loads(file.read_text())["answers"] if file.exists() else []
    questions = [json.loads(line) for line in (testbed / "eval.jsonl").read_text().splitlines()]
    for n, q in enumerate(questions[len(out):], len(out) + 1):
        inputs = processor(images=Image.open(testbed / q["image"]), text=prompt(processor, q["question"]), return_tensors="pt").to(DEVICE)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=64, eos_token_id=2, pad_token_id=0)
        # 4.45 returns prompt and answer together when input_ids are given
        out.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
        if n % 10 == 0 or n == len(questions):
            print(n, "|", out[-1], "|", q["answer"], flush=True)
            file.write_text(json.dumps({"transformers": transformers.__version__, "answers": out}, indent=0) + "\n")


def logits(shared, out):
    """All logits of the prompts of the testbed's every 20th question, and the ids."""
    testbed, out = Path(shared) / "testbed", Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, processor = load(testbed / "model")
    for n, line in enumerate((testbed / "eval.jsonl").read_text().splitlines()[::20]):
        if (out / f"{n}.ids.i32").exists():
            continue
        q = json.loads(line)
        inputs = processor(images=Image.open(testbed / q["image"]), text=prompt(processor, q["question"]), return_tensors="pt")
        with torch.no_grad():
            model(**inputs).logits[0].numpy().astype("<f4").tofile(out / f"{n}.logits.f32")
        inputs["input_ids"][0].numpy().astype("<i4").tofile(out / f"{n}.ids.i32")


def main():
    command, *args = sys.argv[1:]
    if command == "pictures":
        (GOLDEN / "pictures").mkdir(parents=True, exist_ok=True)
        for name, width, height in PICTURES:
            draw(name, width, height).save(GOLDEN / "pictures" / f"{name}.png", optimize=True)
    elif command == "small":
        small(*args)
    elif command == "answers":
        answers(*args)
    elif command == "logits":
        logits(*args)
    elif command == "variant":
        variant(args[0], args[1], int(args[2]))
    elif command == "dump":
        model, processor = load(args[0])
        Path(args[1]).mkdir(parents=True, exist_ok=True)
        for picture in args[2:]:
            embeddings(model, processor, picture).astype("<f4").tofile(Path(args[1]) / (Path(picture).stem + ".embd.f32"))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
