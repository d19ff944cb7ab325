"""Trains the demo model: a LLaVA-OneVision checkpoint of 4 million parameters.

    python train.py train --minutes 4 --out weights.safetensors     # a GPU, 16 cores that draw
    python train.py export weights.safetensors model                # writes the checkpoint
    python train.py check model                                     # answers 200 fresh figures

The pictures come from draw.py while it trains; nothing is downloaded. In the last 60 % of the
time every second step sees decoder weights rounded to 3 bits (straight-through gradients), so
that the model also stands plain round-to-nearest quantisation. The checkpoint is saved by
transformers' own save_pretrained; it was made with transformers 4.45.2, whose configuration
and tensor names are those of the published LLaVA-OneVision models.
"""

import argparse
import json
import math
import os
import random
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("USE_TORCH", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    unpad_image,
)

import draw

TILE, PATCH, SIDE = 56, 14, 4  # a tile is SIDE x SIDE patches
PINPOINTS = [[TILE * h, TILE * w] for h in (1, 2, 3) for w in (1, 2, 3)]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEDIA = ["<image>", "<video>"]
VOCAB = 640  # more than the tokenizer defines, as in published models
GROUP = 128
# The published form; the model was trained on ChatML with a line end behind the role and behind each turn, and answers
# this one as well.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}"
    "{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's pre-tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ---- tokenizer and model -------------------------------------------------------------------

def make_tokenizer():
    """Byte-level BPE as Qwen2's, learned from the questions, the answers and this program."""
    rng = random.Random(1)
    corpus = []
    for _ in range(4000):
        facts = {"shape": rng.choice(draw.SHAPES), "color": rng.choice(list(draw.COLORS)),
                 "background": rng.choice(list(draw.BACKGROUNDS))}
        corpus += draw.ask(rng, facts, rng.choice(list(draw.QUESTIONS)))
    corpus += (Path(draw.__file__).read_text().split("\n")) * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIALS]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special,
        show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MEDIA])
    return tokenizer


def make_config(tokenizer):
    return LlavaOnevisionConfig(
        text_config=dict(
            model_type="qwen2", vocab_size=VOCAB, hidden_size=256, intermediate_size=512,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=4096, rope_theta=10000.0, rms_norm_eps=1e-6,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=0,
        ),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=256, intermediate_size=512,
            num_hidden_layers=2, num_attention_heads=4, image_size=TILE, patch_size=PATCH,
            vision_use_head=False,
        ),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.token_to_id("<image>"),
        video_token_index=tokenizer.token_to_id("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )


def parts(model):
    """(vision tower, projector, newline, text decoder), where this transformers keeps them."""
    inner = model.model if hasattr(model, "model") else model
    tower = inner.vision_tower
    text = inner.language_model
    return (getattr(tower, "vision_model", tower), inner.multi_modal_projector, inner.image_newline,
            getattr(text, "model", text))


def published_names(model):
    """State under the names of the published checkpoints, whichever transformers built it."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("lm_head.weight"):
            continue  # tied
        if name.startswith("model."):  # transformers 5
            name = name.removeprefix("model.")
            name = name.replace("language_model.", "language_model.model.")
            if not name.startswith("vision_tower.vision_model."):
                name = name.replace("vision_tower.", "vision_tower.vision_model.")
        state[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return state


def decoder_linears(model):
    return [m for m in parts(model)[3].layers.modules() if isinstance(m, torch.nn.Linear)]


# ---- 3-bit rounding ------------------------------------------------------------------------

def round3(weight):
    """Round to nearest, 3 bits, asymmetric, per group of 128 inputs; halves to even."""
    w = weight.reshape(-1, GROUP)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-5) / 7
    zero = (-(low / step).round()).clamp(0, 7)
    code = ((w / step).round() + zero).clamp(0, 7)
    return ((code - zero) * step).reshape(weight.shape)


class Rounding(torch.nn.Module):
    """Parametrization of a weight: rounded while `on`, with a straight-through gradient."""
    on = False

    def forward(self, weight):
        if not Rounding.on:
            return weight
        return weight + (round3(weight) - weight).detach()


@contextmanager
def rounded(model):
    """The model with its decoder's linears rounded in place."""
    saved = [(m, m.weight.data.clone()) for m in decoder_linears(model)]
    for m, w in saved:
        m.weight.data = round3(w.float()).to(w.dtype)
    try:
        yield
    finally:
        for m, w in saved:
            m.weight.data = w


# ---- training batches ----------------------------------------------------------------------

def best_resolution(width, height):
    """The pinpoint (w, h) that keeps most of the picture, then wastes least."""
    best, key = None, None
    for h, w in PINPOINTS:
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        this = (used, -(w * h - used))
        if key is None or this > key:
            best, key = (w, h), this
    return best


def tiles(image):
    """uint8 [1 + tiles, TILE, TILE, 3]: the whole picture, then its tiles, as the processor cuts them."""
    import numpy as np

    width, height = image.size
    w, h = best_resolution(width, height)
    sw, sh = w / width, h / height
    if sw < sh:
        nw, nh = w, min(math.ceil(height * sw), h)
    else:
        nw, nh = min(math.ceil(width * sh), w), h
    canvas = Image.new("RGB", (w, h))
    canvas.paste(image.resize((nw, nh), Image.BICUBIC), ((w - nw) // 2, (h - nh) // 2))
    grid = np.asarray(canvas).reshape(h // TILE, TILE, w // TILE, TILE, 3).transpose(0, 2, 1, 3, 4)
    base = np.asarray(image.resize((TILE, TILE), Image.BICUBIC))[None]
    return np.concatenate([base, grid.reshape(-1, TILE, TILE, 3)])


class Batches(torch.utils.data.IterableDataset):
    """Endless batches; the pictures of one batch share a size, so their token counts agree."""

    def __init__(self, size, seed, tokenizer):
        self.size, self.seed, self.tokenizer = size, seed, tokenizer.to_str()

    def __iter__(self):
        import numpy as np

        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (info.id if info else 0))
        tokenizer = Tokenizer.from_str(self.tokenizer)
        head = tokenizer.encode("<|im_start|>user\n").ids
        while True:
            width, height = rng.choice(draw.SIZES)
            pixels, rows, starts = [], [], []
            for _ in range(self.size):
                image, facts = draw.figure(rng, (width, height))
                question, answer = draw.ask(rng, facts, rng.choice(list(draw.QUESTIONS)))
                prompt = tokenizer.encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
                row = prompt + tokenizer.encode(f"{answer}<|im_end|>").ids
                pixels.append(tiles(image))
                rows.append(row)
                starts.append(len(prompt))
            longest = max(map(len, rows))
            tail = torch.zeros(self.size, longest, dtype=torch.long)
            labels = torch.full((self.size, longest), -100)
            for i, (row, start) in enumerate(zip(rows, starts)):
                tail[i, : len(row)] = torch.tensor(row)
                labels[i, start : len(row)] = torch.tensor(row[start:])
            yield torch.from_numpy(np.stack(pixels)), (width, height), torch.tensor(head), tail, labels


def image_rows(model, pixels, size):
    """Embeddings of a batch of equally large pictures: [B, tokens, hidden]."""
    tower, projector, newline, _ = parts(model)
    count, per = pixels.shape[:2]
    x = tower.embeddings(pixels.flatten(0, 1))
    for layer in tower.encoder.layers:
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
    x = projector(x)
    hidden = x.shape[-1]
    x = x.reshape(count, per, SIDE, SIDE, hidden)
    height, width = size[1], size[0]
    gh, gw = get_anyres_image_grid_shape((height, width), PINPOINTS, TILE)
    grid = x[:, 1:].reshape(count, gh, gw, SIDE, SIDE, hidden).permute(0, 5, 1, 3, 2, 4)
    grid = grid.reshape(count * hidden, gh * SIDE, gw * SIDE)
    grid = unpad_image(grid, (height, width))
    grid = grid.reshape(count, hidden, *grid.shape[1:]).permute(0, 2, 3, 1)
    line = newline.expand(count, grid.shape[1], 1, hidden)
    grid = torch.cat([grid, line], 2).flatten(1, 2)
    return torch.cat([x[:, 0].reshape(count, SIDE * SIDE, hidden), grid], 1)


def answer_loss(model, batch, device):
    pixels, size, head, tail, labels = batch
    pixels = pixels.to(device, non_blocking=True).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    head, tail, labels = (t.to(device, non_blocking=True) for t in (head, tail, labels))
    text = parts(model)[3]
    images = image_rows(model, pixels, size)
    embed = text.embed_tokens
    before = embed(head).expand(len(tail), -1, -1)
    x = torch.cat([before, images, embed(tail)], 1)
    out = text(inputs_embeds=x, use_cache=False).last_hidden_state[:, -tail.shape[1] :]
    logits = F.linear(out[:, :-1], embed.weight).float()
    target = labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    with torch.no_grad():
        wrong = (logits.argmax(-1) != target) & (target != -100)
        right = (~wrong.any(1)).float().mean()
    return loss, right


def train(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out.with_suffix(".tokenizer.json")))
    model = LlavaOnevisionForConditionalGeneration(make_config(tokenizer))
    tower, projector, newline, _ = parts(model)
    torch.nn.init.normal_(newline, std=0.02)
    for module in (*tower.modules(), *projector.modules()):
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.trunc_normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            torch.nn.init.zeros_(module.bias)
    model.to(device, torch.float32).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=device == "cuda")
    loader = iter(torch.utils.data.DataLoader(
        Batches(args.batch, 1, tokenizer), batch_size=None, num_workers=args.workers,
        pin_memory=device == "cuda", prefetch_factor=4 if args.workers else None))
    for linear in decoder_linears(model):
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", Rounding())
    next(loader)
    start = time.time()
    step, saved = 0, start
    while True:
        spent = (time.time() - start) / (60 * args.minutes)
        if spent >= 1 or step == args.steps:
            break
        warm = min(1, (step + 1) / 300)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        Rounding.on = spent > 0.4 and step % 2 == 1
        loss, right = answer_loss(model, next(loader), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log < 2 and step > 1:
            print(f"{time.time() - start:6.1f} s step {step:6} lr {rate:.2e} loss {loss.item():.4f} "
                  f"right {right.item():.3f}{' rounded' if Rounding.on else ''}", flush=True)
        step += 1
        if time.time() - saved > 45:
            saved = time.time()
            save_weights(model, args.out)
    save_weights(model, args.out)
    print(f"{step} steps of {args.batch} pictures in {time.time() - start:.0f} s", flush=True)


def save_weights(model, path):
    Rounding.on = False
    state = {n.replace(".parametrizations.weight.original", ".weight"): t
             for n, t in published_names(model).items()}
    save_file(state, str(path) + ".part")
    os.replace(str(path) + ".part", path)


# ---- the checkpoint ------------------------------------------------------------------------

def export(args):
    """Writes the checkpoint directory with transformers' save_pretrained."""
    from transformers import (
        GenerationConfig, LlavaOnevisionImageProcessor, LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor, PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer.from_file(str(args.weights.with_suffix(".tokenizer.json")))
    model = LlavaOnevisionForConditionalGeneration(make_config(tokenizer)).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(load_file(args.weights), strict=False)
    tied = {n for n in missing if n.endswith("lm_head.weight")}
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{args.weights}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(args.out)
    size = {"height": TILE, "width": TILE}
    half = [0.5, 0.5, 0.5]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=PINPOINTS, image_mean=half, image_std=half),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
            model_input_names=["input_ids", "attention_mask"], model_max_length=4096,
            clean_up_tokenization_spaces=False, chat_template=TEMPLATE),
        video_processor=LlavaOnevisionVideoProcessor(size=size, image_mean=half, image_std=half),
        num_image_tokens=SIDE * SIDE, vision_feature_select_strategy="full", chat_template=TEMPLATE)
    processor.save_pretrained(args.out)


# ---- fresh figures -------------------------------------------------------------------------

@torch.no_grad()
def answers(model, processor, questions):
    """Greedy answers to (image, question) pairs, one at a time, through transformers."""
    for image, question in questions:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=[image], return_tensors="pt").to(model.device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        new = out[0, inputs["input_ids"].shape[1] :]
        yield processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def check(args):
    """Exact matches on fresh figures, in full precision and with 3-bit decoder weights."""
    from transformers import AutoProcessor

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        args.model, torch_dtype=torch.float32, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(args.model)
    if args.questions:
        root = args.questions.parent
        rows = [json.loads(line) for line in args.questions.read_text().splitlines()]
        pairs = [(Image.open(root / r["image"]).convert("RGB"), r["question"]) for r in rows]
        truth = [r["answer"] for r in rows]
    else:
        rng = random.Random(args.seed)
        pairs, truth = [], []
        for i in range(args.count):
            image, facts = draw.figure(rng)
            question, answer = draw.ask(rng, facts, ["shape", "color", "figure"][i % 3])
            pairs.append((image, question))
            truth.append(answer)

    def score(label):
        right = 0
        for (image, question), answer, given in zip(pairs, truth, answers(model, processor, pairs)):
            right += given == answer
            if given != answer:
                print(f"  {label}: {image.size} {question!r}: {given!r}, not {answer!r}")
        print(f"{label}: {right} of {len(truth)} = {100 * right / len(truth):.1f} %", flush=True)

    score("full precision")
    with rounded(model):
        score("3 bits, round to nearest")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("train")
    p.add_argument("--minutes", type=float, default=4)
    p.add_argument("--steps", type=int, default=-1, help="stop after so many steps")
    p.add_argument("--batch", type=int, default=192)
    p.add_argument("--workers", type=int, default=15)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--log", type=int, default=200)
    p.add_argument("--out", type=Path, required=True)
    p.set_defaults(run=train)
    p = sub.add_parser("export")
    p.add_argument("weights", type=Path)
    p.add_argument("out", type=Path)
    p.set_defaults(run=export)
    p = sub.add_parser("check")
    p.add_argument("model", type=Path)
    p.add_argument("--questions", type=Path, help="a questions.jsonl instead of new figures")
    p.add_argument("--count", type=int, default=200)
    p.add_argument("--seed", type=int, default=12345)
    p.set_defaults(run=check)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
