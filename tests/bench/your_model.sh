#!/usr/bin/env bash
# What a model loses by each type, on questions of yours:
#
#   tests/bench/your_model.sh MODEL QUESTIONS.jsonl DIR [PAIRS.json [OPTION...]]
#
# MODEL is a hub id or a folder; QUESTIONS has lines of {"image": …, "question": …, "answer": …}, LIMIT of them are asked
# (default 200); PAIRS are calibrated on, or else the built-in set; OPTIONs go to every calibration (--device cuda). DIR gets
# the files, eval.html and mbq3.report.html. A file that is there is not made again. For a first look, in minutes on a small
# model: LIMIT=24, PAIRS and the options --samples 3 --set own-answers=off.
#
# Without a network, with a checkpoint that lies in a folder, as if it came from the hub:
#
#   tests/bench/loopback_hub.py org/name=FOLDER -- tests/bench/your_model.sh org/name QUESTIONS.jsonl DIR
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,14s/^# \?//p' "$0"; exit 2; }
model=$1 questions=$2 dir=$3
shift 3
mbq=${MBQ_CONVERT:-mbq-convert}
calibration=()
[ $# -eq 0 ] || { calibration=(--calib "$1" "${@:2}"); }
mkdir -p "$dir"
make() {
    [ -f "$dir/$1.gguf" ] || "$mbq" "$model" -o "$dir/$1.gguf" "${@:2}"
}
make f16 --type f16
for type in mbq3 iq3_s q3_k q4_k; do
    make "$type" --type "$type" "${calibration[@]}"
done
# What llama-quantize makes of the same pictures' importance matrix, and of none.
for type in iq3_s q3_k q4_k; do
    make "$type-matrix" --type "$type" --method rtn --imatrix image "${calibration[@]}"
    make "$type-rtn" --type "$type" --method rtn
done
candidates=("$dir"/{mbq3,iq3_s,q3_k,q4_k,{iq3_s,q3_k,q4_k}-{matrix,rtn}}.gguf)
"$mbq" eval "${candidates[@]}" --reference "$dir/f16.gguf" --mmproj "$dir/mmproj-f16-f16.gguf" --data "$questions" \
    --limit "${LIMIT:-200}" --cache "$dir/cache" --json "$dir/eval.json" --html "$dir/eval.html"
"$mbq" report "$dir/mbq3.gguf" --eval "$dir/eval.json"
