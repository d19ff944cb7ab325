#!/bin/bash
# Fuzzes every parser at once, a process each: run.sh SECONDS OUT
#
# Beside this script lie the program (`fuzz`, or MBQ_FUZZ_BINARY names it; notes/fuzzing.md builds it) and seeds/, a folder
# per target with a file `dictionary` (`seeds.py` makes it; else seeds.zip is unpacked). OUT gets logs, artifacts, a summary,
# corpora.tar.xz (what is needed of the inputs for the coverage) and artifacts.tar.xz.
set -u
seconds=$1
mkdir -p "$2"
out=$(realpath "$2")
here=$(dirname "$(realpath "$0")")
fuzz=${MBQ_FUZZ_BINARY:-$here/fuzz}
seeds=$here/seeds
if [ ! -d "$seeds" ]; then
    seeds=$out/seeds
    python3 -m zipfile -e "$here/seeds.zip" "$seeds"
fi
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64:allocator_may_return_null=0 RAYON_NUM_THREADS=1 RUST_BACKTRACE=1
mkdir -p "$out/artifacts" "$out/logs" "$out/minimal"
end=$((SECONDS + seconds))

# One target until the time is over; again after each fault, up to a hundred.
target() {
    local name=$1 longest=$2 corpus=$out/corpus/$1 left
    mkdir -p "$corpus" "$seeds/$name"
    local options=(-timeout=10 -rss_limit_mb=1024 -max_len="$longest" -artifact_prefix="$out/artifacts/$name-" -print_final_stats=1)
    [ -f "$seeds/$name/dictionary" ] && options+=(-dict="$seeds/$name/dictionary")
    for _ in $(seq 100); do
        left=$((end - SECONDS))
        [ "$left" -gt 0 ] || break
        MBQ_FUZZ_TARGET=$name "$fuzz" "${options[@]}" -max_total_time="$left" "$corpus" "$seeds/$name" >>"$out/logs/$name" 2>&1 && break
    done
    mkdir -p "$out/minimal/$name"
    MBQ_FUZZ_TARGET=$name timeout 300 "$fuzz" -merge=1 -timeout=10 -rss_limit_mb=1024 -max_len="$longest" \
        -artifact_prefix="$out/logs/" "$out/minimal/$name" "$corpus" "$seeds/$name" >"$out/logs/$name.merge" 2>&1
}

while read -r name longest; do
    target "$name" "$longest" &
done < <("$fuzz" 2>/dev/null)
wait
rm -rf /dev/shm/mbq-fuzz-* "$out"/logs/{crash,oom,timeout,slow-unit}-*

summary() {
    printf '%-14s %12s %8s %8s %8s %8s %9s\n' target executions cov features corpus rss/MiB artifacts
    for log in "$out"/logs/*; do
        [[ $log == *.merge ]] && continue
        name=$(basename "$log")
        stats=$(awk '/stat::number_of_executed_units/ { n += $2 } /stat::peak_rss_mb/ && $2 > rss { rss = $2 }
            { for (i = 1; i < NF; i++) { if ($i == "cov:" && $(i + 1) > cov) cov = $(i + 1); if ($i == "ft:" && $(i + 1) > ft) ft = $(i + 1) } }
            END { printf "%12d %8d %8d", n, cov, ft; print "", rss }' "$log")
        read -r n cov ft rss <<<"$stats"
        printf '%-14s %12s %8s %8s %8s %8s %9s\n' "$name" "$n" "$cov" "$ft" "$(find "$out/minimal/$name" -type f | wc -l)" "$rss" \
            "$(find "$out/artifacts" -name "$name-*" | wc -l)"
    done
}
summary | tee "$out/summary"
# What is too large to carry away stays: inputs of less than so many bytes are packed.
for most in 1000000 8000 4000 2000 1000; do
    (cd "$out/minimal" && find . -type f -size -"$most"c -print0 | tar -cJf ../corpora.tar.xz --null -T -)
    [ "$(stat -c %s "$out/corpora.tar.xz")" -le $((14 << 20)) ] && break
done
tar -C "$out" -cJf "$out/artifacts.tar.xz" artifacts logs summary
ls -la "$out"
