#!/usr/bin/env bash
# The expert kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer, over random
# shapes and damaged arguments; then, where g++-aarch64-linux-gnu and qemu-user-static are installed, as an ARM
# program. The levels avx512_bf16 and amx run against an emulation of their instructions. Usage: [CXX=clang++] sanitize_kernels.sh [rounds]
set -euo pipefail
cd "$(dirname "$0")/../native"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
rounds=${1:-300}
flags=(-std=c++20 -g -fno-omit-frame-pointer -Wall -Wextra -Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unused-function -Wno-unused-variable)
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)

build_and_run() {  # name, what runs the driver or nothing, compiler, its flags
  local name=$1 runner=$2 compiler=$3 made=() x86=()
  shift 3
  [[ $("$compiler" -dumpmachine) != x86_64* ]] || x86=(-DMH_X86 -DMH_EMULATE)
  for source in *.cpp test/driver.cpp; do
    level=()
    case $source in
      level_portable.cpp) ;;
      level_avx2.cpp) level=("${avx2[@]}") ;;
      level_avx512.cpp) level=("${avx512[@]}") ;;
    esac
    [[ ${#x86[@]} -gt 0 || $source != level_a* ]] || continue
    made+=("$out/$(basename "$source").o")
    "$compiler" "${flags[@]}" "${x86[@]}" "$@" "${level[@]}" -c "$source" -o "${made[-1]}"
  done
  "$compiler" "$@" -pthread "${made[@]}" -o "$out/driver"
  echo "$name"
  $runner "$out/driver" "$rounds"
}

sanitize=(-O1 -fno-sanitize-recover=all)
build_and_run "address, undefined behaviour" "" "${CXX:-c++}" "${sanitize[@]}" -fsanitize=address,undefined
build_and_run "threads" "" "${CXX:-c++}" "${sanitize[@]}" -fsanitize=thread
if command -v aarch64-linux-gnu-g++ qemu-aarch64-static >"$out/tools" && [[ $(wc -l <"$out/tools") == 2 ]]; then
  build_and_run "ARM, emulated" qemu-aarch64-static aarch64-linux-gnu-g++ -O2 -static
else
  echo "ARM: not run, for want of aarch64-linux-gnu-g++ or qemu-aarch64-static"
fi
