#!/bin/sh
# Speed of MBQ3 on the CPU. Use a machine that does nothing else.
#
#   tests/bench/run.sh order            two orders of bits: AVX2 time; SASS instructions if nvcc and nvdisasm are found
#   tests/bench/run.sh llama BIN [T]    llama-bench in BIN, T threads (2): MBQ3 beside stock types, 1.5B-shaped random
#                                       models (written to $TMPDIR, 0.6-3 GB each, removed afterwards)
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

order() {
    ${CC:-cc} -O3 -mavx2 "$here/bit_order.c" -o "$work/order"
    "$work/order"
    command -v nvcc nvdisasm > /dev/null || { echo "SASS: no nvcc and nvdisasm in PATH"; return; }
    nvcc -O3 -arch=sm_90 -cubin "$here/bit_order.cu" -o "$work/order.cubin"
    nvdisasm -c "$work/order.cubin" | awk '
        /^\.text\./     { kernel = substr($1, 7); sub(":", "", kernel) }
        /^ *\/\*[0-9a-f]+\*\// && !/NOP|BRA/ { count[kernel]++ }
        END { for (k in count) print "SASS instructions, sm_90:", k, count[k] }' | sort
}

llama() {
    bin=$1 threads=${2:-2}
    models=
    for type in mbq3 q3k q4-0 q4k iq3-s f16; do
        cargo run -q --release --manifest-path "$here/../../Cargo.toml" --example random_gguf -- \
            --shape 1.5b --type $type --layers "${LAYERS:-28}" -o "$work/$type.gguf" > /dev/null
        models="$models -m $work/$type.gguf"
    done
    # every model in one process and one order, five repetitions each
    # shellcheck disable=SC2086
    "$bin/llama-bench" $models -t "$threads" -p "${PROMPT:-512}" -n "${TOKENS:-64}" -r "${REPEAT:-5}" -o md
}

case $1 in
    order) order ;;
    llama) shift; llama "$@" ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
