// Weights that are not packed, [outputs][inputs]: as blocks for the matrix path, and multiplied by a few rows.
#pragma once

#include "loops.inl"
#include "prefetch.inl"
#include "step.inl"

namespace {

// Sixteen outputs by sixteen inputs from k on of plain weights, row by row; zeros where there are none.
const float* plain_block(const Panel& p, int64_t k, float* out, int64_t* stride) {
  const bool whole = p.rows == 16 && k + 16 <= p.inputs, is_bf16 = p.format == MH_PLAIN_BF16;
  const float* floats = reinterpret_cast<const float*>(p.data) + k;
  const uint16_t* bf16 = reinterpret_cast<const uint16_t*>(p.data) + k;
  if (whole && p.format == MH_PLAIN_FLOAT32) {
    *stride = p.inputs;
    return floats;
  }
  *stride = 16;
  uint16_t rounded[16];
  const int64_t columns = p.inputs - k < 16 ? p.inputs - k : 16;
  for (int64_t i = 0; i < 16; i++) {
    float* row = out + 16 * i;
    if (!whole) store(row, set1(0));
    if (i >= p.rows || columns <= 0) continue;
    if (whole) {
      store(row, is_bf16 ? load_bf16(bf16 + i * p.inputs) : load(floats + i * p.inputs));
    } else {
      for (int64_t j = 0; j < columns; j++) {
        const uint32_t bits = is_bf16 ? static_cast<uint32_t>(bf16[i * p.inputs + j]) << 16 : 0;
        is_bf16 ? void(__builtin_memcpy(row + j, &bits, 4)) : void(row[j] = floats[i * p.inputs + j]);
      }
    }
    if (p.format != MH_PLAIN_ROUNDED) continue;
    store_bf16(rounded, load(row));
    store(row, load_bf16(rounded));
  }
  return out;
}

// M rows by N outputs of plain weights, which lie as the rows do: sums over lanes, nothing is transposed. `last` holds
// what is left of the N outputs after a multiple of 16 inputs.
template <int M, int N, class T>
void plain_tile(const Row* rows, const T* w, int64_t inputs, const float* last, float* c, Prefetcher& prefetcher) {
  V sums[M * N];
  times<M * N>([&](auto i) { sums[i.value] = set1(0); });
  const auto step = [&](int64_t k, const auto* from, int64_t stride) {
    V x[M];
    times<M>([&](auto i) { x[i.value] = load(rows[i.value].x + k); });
    times<N>([&](auto o) {
      const V v = row_part(from, o.value * stride);
      times<M>([&](auto i) { sums[i.value * N + o.value] = fma(x[i.value], v, sums[i.value * N + o.value]); });
    });
  };
  int64_t k = 0;
  for (; k + 16 <= inputs; k += 16) {
    prefetcher.next_line();
    step(k, w + k, inputs);
  }
  if (k < inputs) step(k, last, 16);
  times<M * N>([&](auto i) { c[i.value / N * 16 + i.value % N] = sum(sums[i.value]); });
}

inline float number(float x) { return x; }
inline float number(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

// `N` outputs from `output` on of M rows.
template <class T, int N, int M>
void plain_outputs(const Panel& p, int64_t output, const Row* rows, float* c, Prefetcher& prefetcher) {
  const T* w = reinterpret_cast<const T*>(p.data) + output * p.inputs;
  const int64_t whole = p.inputs / 16 * 16;
  float last[N * 16] = {};
  for (int64_t o = 0; o < N; o++)
    for (int64_t k = whole; k < p.inputs; k++) last[16 * o + k - whole] = number(w[o * p.inputs + k]);
  c += output;
  if constexpr (M <= 3) {
    plain_tile<M, N>(rows, w, p.inputs, last, c, prefetcher);
  } else {
    plain_tile<2, N>(rows, w, p.inputs, last, c, prefetcher);
    plain_tile<2, N>(rows + 2, w, p.inputs, last, c + 32, prefetcher);
  }
}

// For a few rows. At 8 it has 44 GFLOP/s where tiles have 54, at 16 they have 74.
template <class T, int M>
void dot_plain(const Panel& p, const Row* rows, float* c) {
  Prefetcher prefetcher(p.next, p.next ? 1 : 0, 0, p.inputs);
  int64_t o = 0;
  for (; o + 2 <= p.rows; o += 2) plain_outputs<T, 2, M>(p, o, rows, c, prefetcher);
  if (o < p.rows) plain_outputs<T, 1, M>(p, o++, rows, c, prefetcher);
  for (; o < 16; o++)
    for (int i = 0; i < M; i++) c[16 * i + o] = 0;
}

}  // namespace
