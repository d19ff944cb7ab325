#!/usr/bin/env bash
# Gathers inputs for mutants.py in DIR: the demo model, a checkpoint of each kind that the tests of families make up, a GGUF
# pair of each, pictures, questions and pairs.
#
#   tests/bench/mutants.sh DIR [PROGRAM]
set -euo pipefail
dir=$(realpath -m "${1:?a folder}") program=$(realpath "${2:-target/release/mbq-convert}")
cd "$(dirname "$0")/../.."
mkdir -p "$dir/kept" "$dir/pictures"
tests=(convert gemma3 idefics3 internvl llava llava_original qwen_vl torch_bin)
MBQ_FIXTURES=$dir/kept cargo test --release "${tests[@]/#/--test=}"
# Of each family's, those that differ most in what files they have and what they are: one for each list of files and type.
declare -A seen
for model in "$dir"/kept/*; do
  kind=$(ls "$model"; grep -oE '"(model_type|architectures)": ?\[?"[^"]*"' "$model/config.json" || true)
  [[ ${seen[$kind]:-} ]] && continue
  "$program" "$model" -o "$dir/try.gguf" --method rtn --type f16 -q 2>/dev/null || continue
  seen[$kind]=1
  name=$(basename "$model")
  mkdir -p "$dir/$name-pair"
  mv "$dir/try.gguf" "$dir/$name-pair/model.gguf"
  mv "$dir/mmproj-try-f16.gguf" "$dir/$name-pair/mmproj-model-f16.gguf"
  sed 's/try/model/g' "$dir/try.mbq.json" > "$dir/$name-pair/model.mbq.json"
  mv "$model" "$dir/$name"
done
rm -rf "$dir/kept" "$dir"/try.*
cp -r demo/model "$dir/demo"
for type in f16 mbq3; do
  mkdir -p "$dir/demo-$type"
  "$program" demo/model -o "$dir/demo-$type/model.gguf" --method rtn --type "$type" -q
done
head -40 demo/eval/questions.jsonl | sed 's!images/!!' > "$dir/questions.jsonl"
cp demo/eval/images/0[0-3]?.png tests/golden/pictures/load/*.* tests/golden/pictures/star/* "$dir/pictures/"
rm "$dir/pictures/expected.json"
cp demo/calib/pairs.json "$dir/" && cp -r demo/calib/images "$dir/pictures-of-pairs" && sed -i 's!images/!pictures-of-pairs/!' "$dir/pairs.json"
"$program" eval "$dir/demo-mbq3/model.gguf" --reference "$dir/demo-f16/model.gguf" --mmproj "$dir/demo-f16/mmproj-model-f16.gguf" \
  --data "$dir/questions.jsonl" --image-root "$dir/pictures" --limit 2 --json "$dir/demo-mbq3/eval.json" -q
