#!/bin/bash
# Builds the patched llama.cpp with CUDA, checks MBQ3's kernels and times them. On a machine with a GPU:
#
#   mbq-convert runtime source DIR          (or any tree with patches/ applied)
#   tests/gpu/run.sh DIR BUILD [step...]
#
# Steps, all of them if none is named: build test tune bench few many sanitizer profile models
# TRIM=1 leaves out of DIR and of the build what llama-bench does not run here (trim.sh): 2 minutes on 16 cores instead of 7.
# `tune` needs a build with MBQ3_TUNE=1 in the environment; `models` needs RANDOM_GGUF, the path of this repository's
# example random_gguf, and room for the files in MODELS (default /dev/shm, the largest is 31 GB).
set -eu -o pipefail

source=$(realpath "$1"); build=$(realpath -m "$2"); shift 2
here=$(dirname "$(realpath "$0")")
steps=${*:-build test bench few many sanitizer profile models}
jobs=$(nproc)
cuda=$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")
export LD_LIBRARY_PATH=$build/bin:$cuda/lib64:${LD_LIBRARY_PATH:-}
wants() { [[ " $steps " == *" $1 "* ]]; }

if [ -n "${TRIM:-}" ]; then
    export LDFLAGS="-Wl,-z,lazy -Wl,--unresolved-symbols=ignore-all" # kernels that are missing
fi
if wants build; then
    ${TRIM:+"$here/trim.sh" "$source"}
    cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=ON -DGGML_NATIVE=OFF -DGGML_AVX2=ON \
        -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES="${ARCH:-90}" -DGGML_CUDA_FA="${FA:-ON}" ${MBQ3_TUNE:+-DCMAKE_CUDA_FLAGS=-DMBQ3_TUNE} \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF > "$build.cmake.log"
    ninja -C "$build" -j "$jobs" ggml > "$build.ninja.log" || { grep -B2 -A12 "error" "$build.ninja.log" | head -60; exit 1; }
    g++ -O2 -std=c++17 "$here/mbq3-cuda.cpp" -o "$build/bin/mbq3-cuda" -I"$source/ggml/include" -I"$cuda/include" \
        -L"$build/bin" -lggml -lggml-base -lggml-cuda -L"$cuda/lib64" -lcudart -pthread ${LDFLAGS:-}
    if [ -n "${TRIM:-}" ]; then # where their address is data, the loader asks for them at once
        nm -D --undefined-only "$build/bin/libggml-cuda.so" | awk '/ _Z.*(flash_attn_ext|mul_mat_q_case)/ { print "void " $2 "(void) { __builtin_trap(); }" }' > "$build/stubs.c"
        gcc -shared -fPIC -w "$build/stubs.c" -o "$build/bin/libstubs.so"
    fi
fi
if [ -n "${TRIM:-}" ]; then export LD_PRELOAD=$build/bin/libstubs.so; fi

if wants test; then
    "$build/bin/mbq3-cuda" test
fi
if wants tune; then
    "$build/bin/mbq3-cuda" tune
fi
if wants bench; then
    "$build/bin/mbq3-cuda" bench ${MBQ3_TUNE:+alone}
fi
for step in few many; do
    if wants $step; then "$build/bin/mbq3-cuda" $step; fi
done
if wants sanitizer; then
    compute-sanitizer --tool memcheck  --error-exitcode 3 "$build/bin/mbq3-cuda" test small
    # racecheck itself stops where cuBLAS has a product of few columns
    GGML_CUDA_MBQ3_CUBLAS_COLUMNS=192 compute-sanitizer --tool racecheck --error-exitcode 3 --kernel-name kns=mbq3 "$build/bin/mbq3-cuda" test small
fi
if wants profile; then
    for kernel in mbq3_mul_mat_vec mbq3_quantize_columns mul_mat_q; do
        GGML_CUDA_DISABLE_GRAPHS=1 ncu --clock-control none --kernel-name "$kernel" --launch-skip 3 --launch-count 1 \
            --section SpeedOfLight --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats \
            --section SchedulerStats --metrics dram__bytes_read.sum "$build/bin/mbq3-cuda" profile
    done
fi
if wants models; then
    ninja -C "$build" -j "$jobs" llama-bench > "$build.ninja2.log"
    models=${MODELS:-/dev/shm}
    for t in ${TYPES:-mbq3 q3k iq3-s q4-0 f16}; do
        file=$models/random-$t.gguf
        "${RANDOM_GGUF:?}" --shape "${SHAPE:-7b}" --type "$t" --head q6k -o "$file"
        "$build/bin/llama-bench" -m "$file" -fa 1 -ngl 99 -p 512,2048,7290 -ub 2048 -n 128 -r "${REPEATS:-5}" -o md
        rm "$file"
    done
fi
