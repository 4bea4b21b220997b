#!/usr/bin/env bash
# The peers of `benchmarks/decode.py` for the Python given (default: python): transformers as pinned, gguf, and
# llama-cpp-python, compiled here for this machine (20 minutes on one core). Usage: install_peers.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
pip=("${1:-python}" -m pip --disable-pip-version-check)

"${pip[@]}" install -q -c constraints.txt torch==2.13.0  # first and pinned: an open range pulls gigabytes of CUDA
"${pip[@]}" install -q -c constraints.txt transformers gguf==0.19.0

# llama.cpp's AMX int8 path stops with an illegal instruction. -march=native (GGML_NATIVE) turns AMX on whatever
# GGML_AMX_INT8=OFF says, so the compiler is told.
if grep -qsw amx_tile /proc/cpuinfo; then
  no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
  export CFLAGS="${CFLAGS:-} $no_amx" CXXFLAGS="${CXXFLAGS:-} $no_amx"
fi
CMAKE_ARGS="${CMAKE_ARGS:-} -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
  "${pip[@]}" install -c constraints.txt --no-binary llama-cpp-python llama-cpp-python==0.3.36
