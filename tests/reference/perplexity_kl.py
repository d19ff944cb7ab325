"""Text-only KL of `mbq-convert eval` against llama-perplexity --kl-divergence on the same tokens.

    python tests/reference/perplexity_kl.py MBQ_CONVERT RUNTIME_BIN TOKENIZER.json REFERENCE.gguf CANDIDATE.gguf TEXT WORK

llama-perplexity scores the second half of every chunk; the same halves become raw prompts and answers of a question
file. A text is shifted until every half survives being turned into text and back. Needs the `tokenizers` package.
"""
import json
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
from tokenizers import Tokenizer

mbq, runtime, tokenizer, reference, candidate, text, work = sys.argv[1:8]
tokenizer = Tokenizer.from_file(tokenizer)
work = pathlib.Path(work)
work.mkdir(exist_ok=True, parents=True)
N, CHUNKS = 64, 4

words = pathlib.Path(text).read_text().split(" ")
for start in range(1000):
    sample = " ".join(words[start:])
    ids = tokenizer.encode(sample, add_special_tokens=False).ids[: N * CHUNKS]
    halves = []
    for c in range(0, N * CHUNKS, N):
        halves += [ids[c : c + N // 2 + 1], ids[c + N // 2 + 1 : c + N]]
    texts = [tokenizer.decode(h, skip_special_tokens=False) for h in halves]
    if all(tokenizer.encode(t, add_special_tokens=False).ids == h for t, h in zip(texts, halves)):
        break
else:
    sys.exit("no shift of this text survives the tokenizer")

(work / "text.txt").write_text(tokenizer.decode(ids))
with open(work / "questions.jsonl", "w") as f:
    for prompt, answer in zip(texts[::2], texts[1::2]):
        f.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")

base = str(work / "base.dat")
# Micro-batches as eval has them, prompt and answer: how many rows a product has decides the kernel and with it the
# rounding, and text that the model was never trained on lets such rounding move the KL by 5 % (-ub 64: .895, 33: .943).
perplexity = [f"{runtime}/llama-perplexity", "-c", str(N), "-b", str(N), "-ub", str(N // 2 + 1), "-t", "1", "--kl-divergence-base", base]
subprocess.run([*perplexity, "-m", reference, "-f", str(work / "text.txt")], check=True, capture_output=True)
with open(base, "rb") as f:
    assert f.read(8) == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", f.read(12))
    tokens = list(struct.unpack(f"<{n_ctx * n_chunk}i", f.read(4 * n_ctx * n_chunk)))
    rows = np.frombuffer(f.read(), np.uint16).reshape(-1, 2 * ((n_vocab + 1) // 2) + 4)
# llama-perplexity keeps log-probabilities in steps of 16 / 65535 down to 16 below the greatest and leaves tokens below
# exp(-16) out of the sum: what it misses of the reference's mass bounds, times a few nats, what its KL may be off by.
scale, low = rows[:, :4].copy().view(np.float32).T
log_p = scale[:, None] * rows[:, 4 : 4 + n_vocab] + low[:, None]
missed = 1 - np.where(log_p > -16, np.exp(log_p.astype(np.float64)), 0).sum(1).mean()
assert tokens == ids, "llama-perplexity saw other tokens"
out = subprocess.run([*perplexity, "-m", candidate, "--kl-divergence"], check=True, capture_output=True, text=True)
theirs = float(re.search(r"Mean\s+KLD:\s+([-\d.e]+)", out.stdout + out.stderr).group(1))

subprocess.run([mbq, "eval", candidate, "--reference", reference, "--data", str(work / "questions.jsonl"), "--runtime", runtime,
                "--cache", str(work / "cache"), "--threads", "1", "--json", str(work / "report.json"), "--quiet"], check=True, stdout=subprocess.DEVNULL)
given = json.load(open(work / "report.json"))["candidates"][0]["text"]["given"]
ours = given["kl_mean"]["value"]
print(f"{n_chunk} chunks of {n_ctx} tokens, {given['positions']} positions: eval {ours:.6f}, llama-perplexity {theirs:.6f}, difference {abs(ours - theirs):.1e}, mass that llama-perplexity misses {missed:.1e}")
assert given["positions"] == n_chunk * (n_ctx - 1 - n_ctx // 2) and abs(ours - theirs) < 1e-4 + missed
