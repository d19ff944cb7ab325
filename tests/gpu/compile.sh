#!/bin/bash
# Compiles the CUDA files that patches/ adds or touches for every architecture named; needs nvcc, no GPU.
#
#   tests/gpu/compile.sh DIR [arch...]        DIR: source tree with patches/ applied; default 75 80 86 89 90 100 120
# JOBS at a time (nproc).
set -u
cd "$1/ggml/src/ggml-cuda" || exit 2
shift
types="Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 BF16 F16" # of K and V: as cmake says where only f16 is built
FLASH_ATTENTION=$(for k in $types; do for v in $types; do
    echo "-DGGML_CUDA_FA_${k}_$v=$([ $k$v = F16F16 ] && echo 1 || echo 0)"
done; done)
export FLASH_ATTENTION
compile() { # FILE ARCH
    local start=$SECONDS said
    if said=$(nvcc -std=c++17 -O3 -arch="sm_$2" -use_fast_math -extended-lambda $FLASH_ATTENTION -DGGML_CUDA_USE_GRAPHS \
        -DGGML_CUDA_PEER_MAX_BATCH_SIZE=128 -DGGML_SCHED_MAX_COPIES=4 -I.. -I../../include -I. -c "$1" -o /dev/null 2>&1); then
        echo "ok $1 sm_$2 $((SECONDS - start)) s"
    else
        echo "FAILED $1 sm_$2"; head -20 <<< "$said"; return 1
    fi
}
export -f compile
for file in mmq.cu mmvq.cu template-instances/mmq-instance-mbq3.cu ggml-cuda.cu convert.cu mbq3-mmvq.cu mbq3-mma.cu linear-f16.cu fattn.cu quantize.cu getrows.cu; do
    for arch in ${*:-75 80 86 89 90 100 120}; do echo "$file $arch"; done
done | xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'compile "$0" "$1"'
