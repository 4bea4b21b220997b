// What a decoding step needs besides its products: norms, and attention of a few heads to a split of keys.
#pragma once

#include "activation.inl"
#include "kernels.h"

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

// out[m · out_stride + i] = q_m · k_i; the width is a multiple of 16
template <int M, class T>
void score_heads(const float* q, int64_t q_stride, const T* k, int64_t stride, int64_t keys, int64_t width, float* out,
                 int64_t out_stride) {
  for (int64_t i = 0; i < keys; i++, k += stride) {
    V sums[M];
    for (int m = 0; m < M; m++) sums[m] = set1(0);
    for (int64_t j = 0; j < width; j += 16) {
      const V key = row_part(k, j);
      for (int m = 0; m < M; m++) sums[m] = fma(load(q + m * q_stride + j), key, sums[m]);
    }
    for (int m = 0; m < M; m++) out[m * out_stride + i] = sum(sums[m]);
  }
}

// y_m = Σ_i p[m · p_stride + i] · v_i, in strips of C sixteens
template <int M, int C, class T>
void mix_strip(const float* p, int64_t p_stride, const T* v, int64_t stride, int64_t keys, float* y, int64_t y_stride) {
  V sums[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sums[m][c] = set1(0);
  for (int64_t i = 0; i < keys; i++, v += stride)
    for (int c = 0; c < C; c++) {
      const V value = row_part(v, 16 * c);
      for (int m = 0; m < M; m++) sums[m][c] = fma(set1(p[m * p_stride + i]), value, sums[m][c]);
    }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(y + m * y_stride + 16 * c, sums[m][c]);
}

template <int M, class T>
void mix_heads(const float* p, int64_t p_stride, const T* v, int64_t stride, int64_t keys, int64_t width, float* y,
               int64_t y_stride) {
  constexpr int C = 4 / M;
  int64_t j = 0;
  for (; j + 16 * C <= width; j += 16 * C) mix_strip<M, C>(p, p_stride, v + j, stride, keys, y + j, y_stride);
  for (; j < width; j += 16) mix_strip<M, 1>(p, p_stride, v + j, stride, keys, y + j, y_stride);
}

// x[0..n) becomes e^(x - largest), zero where x is -inf; n is padded with -inf to a multiple of 16. Returns the sum.
float exponentials(float* x, int64_t n, float largest) {
  const V shift = set1(largest), low = set1(-3.0e38f);
  V total = set1(0);
  for (int64_t i = 0; i < n; i += 16) {
    const V l = load(x + i), e = where_less(l, low, set1(0), exp(sub(l, shift)));
    store(x + i, e);
    total = add(total, e);
  }
  return sum(total);
}

template <class T>
void attend_rows(const mh::KvSplit& s, const T* k, const T* v) {
  const int64_t keys = s.keys, padded = (keys + 15) / 16 * 16;
  if (s.heads == 4)
    score_heads<4>(s.q, s.q_stride, k, s.k_stride, keys, s.k_width, s.scratch, mh::kSplitKeys);
  else
    for (int64_t h = 0; h < s.heads; h++)
      score_heads<1>(s.q + h * s.q_stride, 0, k, s.k_stride, keys, s.k_width, s.scratch + h * mh::kSplitKeys, 0);
  for (int64_t h = 0; h < s.heads; h++) {
    float* p = s.scratch + h * mh::kSplitKeys;
    for (int64_t i = keys; i < padded; i++) p[i] = 0;
    for (int64_t i = 0; i < padded; i += 16) {
      const V l = mul(load(p + i), set1(s.scale));
      store(p + i, s.cap > 0 ? mul(set1(s.cap), tanh(div(l, set1(s.cap)))) : l);
    }
    for (int64_t i = keys; i < padded; i++) p[i] = -__builtin_inff();
    for (int64_t i = 0; s.mask && i < keys; i++)
      if (!s.mask[i]) p[i] = -__builtin_inff();
    float largest = p[0];
    for (int64_t i = 1; i < keys; i++) largest = p[i] > largest || p[i] != p[i] ? p[i] : largest;
    s.largest[h] = largest;
    s.total[h] = exponentials(p, padded, largest > -3.0e38f || largest != largest ? largest : 0.0f);
  }
  if (s.heads == 4)
    mix_heads<4>(s.scratch, mh::kSplitKeys, v, s.v_stride, keys, s.v_width, s.y, s.y_stride);
  else
    for (int64_t h = 0; h < s.heads; h++)
      mix_heads<1>(s.scratch + h * mh::kSplitKeys, 0, v, s.v_stride, keys, s.v_width, s.y + h * s.y_stride, 0);
}

void attend(const mh::KvSplit& s) {
  if (s.is_bf16)
    attend_rows(s, static_cast<const uint16_t*>(s.k), static_cast<const uint16_t*>(s.v));
  else
    attend_rows(s, static_cast<const float*>(s.k), static_cast<const float*>(s.v));
}

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
  for (; i < rows; i++) score_heads<1>(x, 0, w + i * width, width, 1, width, out + i, 0);
}

void gemv(const float* x, const void* w, bool is_bf16, int64_t rows, int64_t width, float* out) {
  if (is_bf16)
    gemv_rows(x, static_cast<const uint16_t*>(w), rows, width, out);
  else
    gemv_rows(x, static_cast<const float*>(w), rows, width, out);
}

}  // namespace
