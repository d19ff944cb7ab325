"""How much of a quantised decoder's divergence comes from the first positions of the prompt, on which attention rests:
KL from the full-precision model over the answers of N pairs, with the file's weights everywhere, with them everywhere
but at the first FIRST positions, and with them only there.

    python sink_tokens.py SHARED N FILE.gguf ...        (torch 2.5.1, transformers 4.45.2, gguf; pairs 41 to 40 + N)

SHARED is the folder that holds testbed/. The files must hold the checkpoint's own weights (no scales folded in).
Activations stay float32, so this is the weights' part alone.
"""

import json
import os
import sys

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers_goldens import load

FIRST = 4
LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# A type that the gguf package does not know.
MBQ3 = int.__new__(gguf.GGMLQuantizationType, 192)
MBQ3._name_, MBQ3._value_ = "MBQ3", 192
gguf.GGMLQuantizationType._value2member_map_[192] = MBQ3
gguf.GGML_QUANT_SIZES[MBQ3] = (128, 52)


def mbq3(data):
    """Weights of MBQ3 blocks, docs/format.md."""
    blocks = data.reshape(-1, 52)
    d, m = (blocks[:, i:i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    q = blocks[:, 4:].copy().view("<u4").reshape(-1, 3, 4)  # words A, B, C of chunk t
    a, b, c = q[:, 0], q[:, 1], q[:, 2]
    low, two, high = 0x07070707, 0x03030303, 0x04040404
    words = [a & low, (a >> 3) & low, b & low, (b >> 3) & low, c & low, (c >> 3) & low]
    words += [((a >> 6) & two) | ((c >> 4) & high), ((b >> 6) & two) | ((c >> 5) & high)]
    codes = np.ascontiguousarray(np.stack(words, -1)).view(np.uint8).reshape(len(blocks), 128)
    return d * codes + m


def tensors(path):
    """Decoder linears of a GGUF file by name."""
    out = {}
    for t in gguf.GGUFReader(path).tensors:
        if t.name.split(".")[-2] in LINEARS and t.name.endswith(".weight"):
            if t.tensor_type == MBQ3:
                values = mbq3(np.asarray(t.data).reshape(-1)).reshape(t.shape[1], t.shape[0])
            else:
                values = gguf.quants.dequantize(t.data, t.tensor_type)
            out[t.name] = torch.tensor(values.astype(np.float32))
    return out


def answers(model, processor, root, pairs):
    """Per pair: embeddings that enter the decoder, and the log-probabilities of the answer's positions."""
    decoder, seen = model.language_model, []
    handle = decoder.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    rows = []
    for pair in pairs:
        question, answer = (turn["value"].replace("<image>\n", "") for turn in pair["conversations"][:2])
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        picture = Image.open(f"{root}/{pair['image']}")
        start = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"].shape[1]
        whole = processor(images=picture, text=prompt + answer + "<|im_end|>", return_tensors="pt")
        length = whole["input_ids"].shape[1] - start
        with torch.no_grad():
            logits = model(**whole).logits[0]
        rows.append((seen.pop(), length, torch.log_softmax(logits[-length - 1:-1].double(), -1)))
    handle.remove()
    return rows


def main():
    shared, count, files = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    root = f"{shared}/testbed"
    model, processor = load(f"{root}/model")
    with open(f"{root}/calib.json") as f:
        rows = answers(model, processor, root, json.load(f)[40:40 + count])
    decoder = model.language_model
    state = {"weights": None, "pick": None}

    def hook(name):
        def run(module, args, output):
            if state["weights"] is None:
                return output
            other = F.linear(args[0], state["weights"][name], module.bias)
            here = state["pick"](torch.arange(output.shape[1]))
            return torch.where(here[None, :, None], other, output)
        return run

    for layer, block in enumerate(decoder.model.layers):
        for kind, name in LINEARS.items():
            block.get_submodule(name).register_forward_hook(hook(f"blk.{layer}.{kind}.weight"))

    def divergence():
        total, positions = 0.0, 0
        for embeddings, length, reference in rows:
            with torch.no_grad():
                logits = decoder(inputs_embeds=embeddings).logits[0]
            near = torch.log_softmax(logits[-length - 1:-1].double(), -1)
            total += (reference.exp() * (reference - near)).sum().item()
            positions += length
        return total / positions

    print(f"{sum(r[1] for r in rows)} positions of {len(rows)} answers", flush=True)
    for file in files:
        state["weights"] = tensors(file)
        line = []
        for pick in (lambda i: i >= 0, lambda i: i >= FIRST, lambda i: i < FIRST):
            state["pick"] = pick
            line.append(f"{divergence():.4f}")
        print(f"{file}: everywhere {line[0]}, but the first {FIRST} {line[1]}, only there {line[2]}", flush=True)


if __name__ == "__main__":
    main()
