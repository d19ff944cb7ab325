"""watch.py NAME TABLE PROGRESS RECORD LIMIT COMMAND...

Runs COMMAND for at most LIMIT seconds. While it runs: the largest memory in use on the GPU (nvidia-smi) and the largest
resident memory of the process, in all and without pages of files; and when blocks were finished, from the PROGRESS
file. Appends a row to TABLE; the times of the phases come from RECORD (the .mbq.json beside the model), or where the
run did not get that far, from what was seen.
"""
import json
import os
import re
import subprocess
import sys
import threading
import time

name, table, progress, record, limit = sys.argv[1:6]
command, start = sys.argv[6:], time.time()
seen = {"gpu": 0, "rss": 0, "anonymous": 0}
blocks = []  # (seconds, blocks finished)


def gpu():
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=200"]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        ask += ["-i", os.environ["CUDA_VISIBLE_DEVICES"]]
    try:
        with subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as smi:
            for line in smi.stdout:
                if line.strip().isdigit():
                    seen["gpu"] = max(seen["gpu"], int(line))
                if process.poll() is not None:
                    smi.kill()
    except OSError:
        pass  # no GPU here


process = subprocess.Popen(command)
threading.Thread(target=gpu, daemon=True).start()
while process.poll() is None:
    if time.time() - start > float(limit):
        process.kill()
    try:
        status = open(f"/proc/{process.pid}/status").read()
        for key, field in (("rss", "VmHWM"), ("anonymous", "RssAnon")):
            found = re.search(rf"{field}:\s+(\d+) kB", status)
            seen[key] = max(seen[key], int(found[1]) // 1024) if found else seen[key]
        state = json.load(open(progress))
        done = (bool(state["sensitivities"]), max(len(state["blocks"]), len(state.get("compensated", []))))
        if not blocks or blocks[-1][1] != done:
            blocks.append((time.time() - start, done))
    except (OSError, ValueError, KeyError):
        pass
    time.sleep(0.05)
all_seconds = time.time() - start
times = {}
try:
    times = {k: v for k, v in json.load(open(record))["calibration"]["seconds"].items()}
except (OSError, ValueError, KeyError, TypeError):
    pass
row = {"run": name, "rc": process.returncode, "seconds": round(all_seconds, 1), "gpu_MiB": seen["gpu"],
       "rss_MiB": seen["rss"], "anonymous_MiB": seen["anonymous"], "phases": times,
       "seen": [[round(t, 1), *done] for t, done in blocks]}
with open(table, "a") as f:
    f.write(json.dumps(row) + "\n")
