#!/bin/bash
# Compiles the CUDA files that MBQ3 adds or touches for every architecture named; needs nvcc, no GPU.
#
#   tests/gpu/compile.sh DIR [arch...]        DIR: source tree with patches/ applied; default 75 80 86 89 90 100 120
set -u
cd "$1/ggml/src/ggml-cuda" || exit 2
shift
failed=0
for file in mbq3-mmvq.cu quantize.cu convert.cu getrows.cu mmq.cu template-instances/mmq-instance-mbq3.cu mmvq.cu ggml-cuda.cu; do
    for arch in ${*:-75 80 86 89 90 100 120}; do
        start=$SECONDS
        if nvcc -std=c++17 -O3 -arch="sm_$arch" -use_fast_math -extended-lambda -DGGML_CUDA_USE_GRAPHS \
            -DGGML_CUDA_PEER_MAX_BATCH_SIZE=128 -DGGML_SCHED_MAX_COPIES=4 -I.. -I../../include -I. -c "$file" -o /dev/null 2> /tmp/mbq3-compile.$$; then
            echo "ok $file sm_$arch $((SECONDS - start)) s"
        else
            echo "FAILED $file sm_$arch"; head -20 /tmp/mbq3-compile.$$; failed=1
        fi
    done
done
rm -f /tmp/mbq3-compile.$$
exit $failed
