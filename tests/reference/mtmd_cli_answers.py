"""Compares the answers of `mbq-convert eval --json REPORT` with llama-mtmd-cli's, question by question.

    python tests/reference/mtmd_cli_answers.py REPORT.json RUNTIME_BIN MODEL.gguf MMPROJ.gguf CANDIDATE [COUNT]

CANDIDATE is the model's place among the report's candidates, or -1 for the reference. One process a question,
greedy; also reports their time, to set against eval's.
"""
import json
import subprocess
import sys
import time

report, runtime, model, mmproj, candidate = sys.argv[1:6]
count = int(sys.argv[6]) if len(sys.argv) > 6 else 100
report = json.load(open(report))
candidate = int(candidate)
threads, limit = str(report["threads"]), str(report["data"]["max_tokens"])

same = right_same = asked = 0
start = time.time()
for q in [q for q in report["questions"] if q["image"]][:count]:
    command = [f"{runtime}/llama-mtmd-cli", "-m", model, "--mmproj", mmproj, "--image", q["image"], "-p", q["question"],
               "--temp", "0", "-n", limit, "-t", threads, "-c", "4096", "--no-warmup"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    ours = q["reference"] if candidate < 0 else q["candidates"][candidate]
    asked += 1
    same += out == ours["text"].strip()
    right_same += (out == q["expected"]) == ours["correct"]
    if out != ours["text"].strip():
        print(f"{q['id']}: eval {ours['text']!r}, llama-mtmd-cli {out!r}, expected {q['expected']!r}", flush=True)
print(f"{asked} questions: same answer {same}, same verdict {right_same}; {time.time() - start:.1f} s for {asked} processes")
