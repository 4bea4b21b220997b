#!/usr/bin/env bash
# The expert kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer, over random
# shapes and damaged arguments. The AMX level runs against an emulation of the tiles. Usage: sanitize_kernels.sh [rounds]
set -euo pipefail
cd "$(dirname "$0")/../native"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
rounds=${1:-300}
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -DMH_EMULATE -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unused-function -Wno-unused-variable)
avx2=() avx512=()
if [[ $(uname -m) == x86_64 ]]; then
  flags+=(-DMH_X86)
  avx2=(-mavx2 -mfma -mf16c)
  avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
fi

build_and_run() {  # name, sanitizers
  for source in *.cpp test/driver.cpp; do
    level=()
    case $source in
      level_avx2.cpp) level=("${avx2[@]}") ;;
      level_avx512.cpp) level=("${avx512[@]}") ;;
    esac
    "${CXX:-c++}" "${flags[@]}" "$2" -fno-sanitize-recover=all "${level[@]}" -c "$source" -o "$out/$(basename "$source").o"
  done
  "${CXX:-c++}" "$2" -pthread "$out"/*.o -o "$out/driver"
  echo "$1"
  "$out/driver" "$rounds"
}

build_and_run "address, undefined behaviour" -fsanitize=address,undefined
build_and_run "threads" -fsanitize=thread
