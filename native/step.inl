// What a decoding step needs besides its products: norms, and one row times a plain matrix.
#pragma once

#include "loops.inl"

namespace {

void norm(const float* x, int64_t n, const float* weight, float eps, float* y) {
  V even = set1(0), odd = set1(0);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const V a = load(x + i), b = load(x + i + 16);
    even = fma(a, a, even), odd = fma(b, b, odd);
  }
  float squares = sum(add(even, odd));
  for (; i < n; i++) squares += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  const V s = set1(scale);
  for (i = 0; i + 16 <= n; i += 16) store(y + i, mul(mul(load(x + i), s), load(weight + i)));
  for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

inline V row_part(const float* row, int64_t j) { return load(row + j); }
inline V row_part(const uint16_t* row, int64_t j) { return load_bf16(row + j); }

template <class T>
void gemv_rows(const float* x, const T* w, int64_t rows, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    V sums[4] = {set1(0), set1(0), set1(0), set1(0)};
    const T* at = w + i * width;
    for (int64_t j = 0; j < width; j += 16) {
      const V part = load(x + j);
      for (int r = 0; r < 4; r++) sums[r] = fma(part, row_part(at + r * width, j), sums[r]);
    }
    for (int r = 0; r < 4; r++) out[i + r] = sum(sums[r]);
  }
  for (; i < rows; i++) {
    V total = set1(0);
    for (int64_t j = 0; j < width; j += 16) total = fma(load(x + j), row_part(w + i * width, j), total);
    out[i] = sum(total);
  }
}

void gemv(const float* x, const void* w, bool is_bf16, int64_t rows, int64_t width, float* out) {
  if (is_bf16)
    gemv_rows(x, static_cast<const uint16_t*>(w), rows, width, out);
  else
    gemv_rows(x, static_cast<const float*>(w), rows, width, out);
}

}  // namespace
