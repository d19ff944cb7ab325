#!/usr/bin/env bash
# The manylinux tag of what is built here: the oldest one that has every version of glibc and libstdc++ that the files ask for.
# maturin looks at the program alone; llama.cpp's libraries lie packed in it and ask for more.
#
#   build/wheel/tag.sh PROGRAM LIBRARY...
#   objdump -T LIBRARY | build/wheel/tag.sh
set -euo pipefail
newest() { { grep -o "${1}_[0-9.]*" <<<"$symbols" || true; } | cut -d_ -f2 | sort -V | tail -n 1; }
if [ $# = 0 ]; then symbols=$(cat); else symbols=$(objdump -T "$@"); fi
glibc=$(newest '\bGLIBC')
[[ $glibc == 2.* ]] || { echo "no glibc is asked for: these are no Linux libraries" >&2; exit 1; }
# libstdc++ by the manylinux policies (PEP 600): the glibc beside which distributions have it.
libstdcxx=$(newest GLIBCXX)
case ${libstdcxx:-none} in
none | 3.4 | 3.4.? | 3.4.1?) beside=17 ;;
3.4.2[0-4]) beside=28 ;;
3.4.2[5-8]) beside=31 ;;
3.4.29) beside=34 ;;
3.4.30) beside=35 ;;
3.4.3[1-3]) beside=39 ;;
*) echo "GLIBCXX_$libstdcxx: the manylinux tag that has it is not known here; add it to build/wheel/tag.sh" >&2; exit 1 ;;
esac
minor=$(cut -d. -f2 <<<"$glibc")
echo "manylinux_2_$((minor > beside ? minor : beside))"
