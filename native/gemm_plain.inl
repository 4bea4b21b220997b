// Rows by weights [outputs][inputs], however many rows: each product is sixteen sums over the inputs and then `sum`, as
// `dot_plain` has it, so that a row has the same bits alone and among others.
#pragma once

#include "plain.inl"

namespace {

constexpr int64_t kFewSums = 8;       // rows for which weights are not worth a copy
constexpr int64_t kPlainChunk = 480;  // inputs of 16 outputs that stay in the first cache
constexpr int64_t kPlainStride = kPlainChunk + 16;  // outputs a power of two apart would all fall into one set of it
static_assert(16 * kPlainStride <= mh::kScratch, "a chunk's place");

// M rows by N outputs over n inputs. What is summed before and not yet to an end lies in `parts`, [M][N][16].
template <int M, int N, class T>
void sums_tile(const float* const* x, int64_t k, const T* w, int64_t stride, int64_t n, float* parts, bool first,
               bool last, float* c) {
  V s[M * N];
  times<M * N>([&](auto i) { s[i.value] = first ? set1(0) : load(parts + 16 * i.value); });
  for (int64_t j = 0; j < n; j += 16) {
    V v[N];
    times<N>([&](auto o) { v[o.value] = row_part(w + o.value * stride, j); });
    times<M>([&](auto i) {
      const V row = load(x[i.value] + k + j);
      times<N>([&](auto o) { s[i.value * N + o.value] = fma(row, v[o.value], s[i.value * N + o.value]); });
    });
  }
  if (!last) {
    times<M * N>([&](auto i) { store(parts + 16 * i.value, s[i.value]); });
  } else if constexpr (M * N == 16) {
    float all[16];
    store(all, sums(s));
    for (int i = 0; i < M; i++) __builtin_memcpy(c + 16 * i, all + N * i, N * sizeof(float));
  } else {
    times<M * N>([&](auto i) { c[i.value / N * 16 + i.value % N] = sum(s[i.value]); });
  }
}

// `outputs` of up to kSumRows rows.
template <int M, class T>
void sums_strip(int64_t m, const float* const* x, int64_t k, const T* w, int64_t stride, int64_t outputs, int64_t n,
                float* parts, bool first, bool last, float* c) {
  if (m < M) {
    if constexpr (M > 1) sums_strip<M - 1>(m, x, k, w, stride, outputs, n, parts, first, last, c);
    return;
  }
  constexpr int N = M == 1 ? 4 : kSumOutputs;  // one row waits for its own sums
  int64_t o = 0;
  for (; o + N <= outputs; o += N)
    sums_tile<M, N>(x, k, w + o * stride, stride, n, parts + 16 * M * o, first, last, c + o);
  for (; o < outputs; o++)
    sums_tile<M, 1>(x, k, w + o * stride, stride, n, parts + 16 * M * o, first, last, c + o);
}

// out[i] = x · row i of w [rows][width], the width a multiple of 16: one row of the same.
void gemv(const float* x, const void* w, bool is_bf16, int64_t rows, int64_t width, float* out) {
  if (is_bf16)
    sums_strip<1>(1, &x, 0, static_cast<const uint16_t*>(w), width, rows, width, nullptr, true, true, out);
  else
    sums_strip<1>(1, &x, 0, static_cast<const float*>(w), width, rows, width, nullptr, true, true, out);
}

template <class T>
void few_sums(const Panel& p, const float* const* x, int64_t rows, float* c) {  // the weights read where they lie
  for (int64_t i = 0; i < rows; i += kSumRows)
    sums_strip<kSumRows>(least(kSumRows, rows - i), x + i, 0, reinterpret_cast<const T*>(p.data), p.inputs, p.rows,
                         p.inputs, nullptr, true, true, c + 16 * i);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t o = p.rows; o < 16; o++) c[16 * i + o] = 0;
}

// Inputs [k, k + n) of a panel's sixteen outputs, row by row; zeros where there are none.
void widen_rows(const Panel& p, int64_t k, int64_t n, float* out) {
  float block[256];
  for (int64_t j = 0; j < n; j += 16) {
    int64_t stride;
    const float* from = plain_block(p, k + j, block, &stride);
    for (int64_t o = 0; o < 16; o++) store(out + o * kPlainStride + j, load(from + o * stride));
  }
}

// c [rows][16]. Rows are zero up to a multiple of 16 inputs; scratch: kScratch floats, then 256 for each row where there
// are more inputs than kPlainChunk.
void gemm_plain(const Panel& p, const float* const* x, int64_t rows, float* scratch, float* c) {
  if (rows <= kFewSums && p.inputs % 16 == 0 && p.format != MH_PLAIN_ROUNDED)
    return p.format == MH_PLAIN_BF16 ? few_sums<uint16_t>(p, x, rows, c) : few_sums<float>(p, x, rows, c);
  float* parts = scratch + mh::kScratch;
  for (int64_t k = 0; k < p.inputs; k += kPlainChunk) {
    const int64_t n = least(kPlainChunk, (p.inputs - k + 15) / 16 * 16);
    widen_rows(p, k, n, scratch);
    for (int64_t i = 0; i < rows; i += kSumRows)
      sums_strip<kSumRows>(least(kSumRows, rows - i), x + i, k, scratch, kPlainStride, 16, n, parts + 256 * i, k == 0,
                           k + n >= p.inputs, c + 16 * i);
  }
}

}  // namespace
