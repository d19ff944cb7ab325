#!/bin/bash
# calibrate.sh BINARY TEMPLATE WORK [STEP...]
#
# Time and memory of calibration at the shapes of LLaVA-OneVision-7B and 72B, with random weights. BINARY is mbq-convert
# (`--features cuda`; its CUDA libraries on LD_LIBRARY_PATH), TEMPLATE a checkpoint directory of the family (tokenizer,
# configuration), WORK a directory with room for the checkpoints (7B: 3.4 GB and 0.5 GB a block; 72B: 5.2 GB and 1.8 GB a block).
# Python 3 with torch and safetensors makes the checkpoints.
#
# A step is SHAPE:BLOCKS:TILES:SAMPLES:MODE[:LIMIT], MODE one of
#   mbq         the paper's method: sensitivities and the search
#   compensate  the default: error compensation, no gradients and no search
#   gradients   --vision-weight ratio: sensitivities and compensation
#   same        the first two on the CPU and on DEVICE, which must agree (compare.py; for the shape `tiny`)
# LIMIT in seconds, 600 where none is given. Default steps: see below; four blocks tell the time per block.
# Environment: DEVICE (cuda), MEMORY (16G), GPU_MEMORY (24G), PYTHON (python3), ARGS (further arguments).
# Prints one table and leaves it as WORK/table.jsonl; a step that fails leaves its messages in WORK/<step>.log and does not
# stop those after it.
set -u
binary=$(realpath "$1") template=$(realpath "$2") here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$3"; work=$(realpath "$3"); shift 3
[ $# -gt 0 ] || set -- tiny:2:1:8:same:60 7b:4:1:128:mbq:150 7b:4:1:128:compensate:150 72b:2:1:32:compensate:120 72b:2:1:32:mbq:120 7b:2:4:32:mbq:60
device=${DEVICE:-cuda} python=${PYTHON:-python3}
status=0
measure() { # NAME MODE DEVICE
  case $2 in
    mbq) args=(--method mbq-scales) ;;
    compensate) args=(--method mbq) ;;
    gradients) args=(--method mbq --vision-weight ratio) ;;
  esac
  local out=$work/run-$1
  rm -rf "$out"; mkdir -p "$out"
  # shellcheck disable=SC2086
  "$python" "$here/watch.py" "$1" "$work/table.jsonl" "$out/mbq-progress.json" "$out/model.mbq.json" "${limit:-600}" \
    "$binary" "$data/model" -o "$out/model.gguf" --type mbq3 "${args[@]}" --calib "$data/pairs.jsonl" \
    --samples "$samples" --device "$3" --memory "${MEMORY:-16G},${GPU_MEMORY:-24G}" \
    --work-dir "$out" ${ARGS:-} > "$work/$1.log" 2>&1 || status=1
  cp "$out/model.mbq.json" "$work/$1.mbq.json" 2>/dev/null || { status=1; echo "$1:"; tail -n 5 "$work/$1.log"; }
  rm -rf "$out"
}
for step in "$@"; do
  IFS=: read -r shape blocks tiles samples mode limit <<< "$step"
  data=$work/$shape-$blocks-$tiles
  name=$(tr : - <<< "$step")
  if [ ! -e "$data/made-$samples" ]; then
    # Only one checkpoint lies there at a time.
    find "$work" -mindepth 1 -maxdepth 1 -type d -name '*-*-*' ! -path "$data" -exec rm -r {} +
    "$python" "$here/shape.py" "$data" "$template" "$shape" "$blocks" "$samples" "$tiles" > "$work/make-$name.log" 2>&1 ||
      { echo "$name: no checkpoint"; tail -n 5 "$work/make-$name.log"; status=1; continue; }
    touch "$data/made-$samples"
  fi
  case $mode in
    same)
      for m in mbq compensate; do
        for d in cpu "$device"; do measure "$name-$m-$d" "$m" "$d"; done
        echo -n "$m, cpu and $device: "
        "$python" "$here/compare.py" "$work/$name-$m-cpu.mbq.json" "$work/$name-$m-$device.mbq.json" || status=1
      done ;;
    mbq | compensate | gradients) measure "$name" "$mode" "$device" ;;
    *) echo "$name: no such mode"; status=1 ;;
  esac
done
"$python" - "$work/table.jsonl" << 'END'
import json, sys
print("| run | rc | s in all | vision | gradients | blocks | s a block | GPU MiB | host MiB | without file pages |")
print("|---|---|---|---|---|---|---|---|---|---|")
for line in open(sys.argv[1]):
    r = json.loads(line)
    p = r["phases"].get("phases", {})
    each = p.get("each block", [])
    # The first block may pay for what is made once.
    each = each[1:] or each
    cells = [r["run"], r["rc"], r["seconds"], p.get("vision", ""), p.get("sensitivity", ""), p.get("blocks", ""),
             round(sum(each) / len(each), 2) if each else f"seen {r['seen'][-3:]}", r["gpu_MiB"], r["rss_MiB"], r["anonymous_MiB"]]
    print("| " + " | ".join(str(c) for c in cells) + " |")
END
exit $status
