// What a decoding step needs besides its products: norms and routers' scores.
#pragma once

#include "activation.inl"
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

// What a router makes of its logits, which `out` may be: sigmoids, or the softmax.
void scores(bool is_sigmoid, const float* logits, int64_t n, float* out) {
  float most = logits[0];
  for (int64_t i = 1; i < n; i++) most = logits[i] > most || logits[i] != logits[i] ? logits[i] : most;
  const V shift = set1(most), low = set1(-3.0e38f);
  V total = set1(0);
  const auto each = [&](const float* from, float* to) {
    const V l = load(from);
    if (is_sigmoid) return store(to, sigmoid(l));
    const V e = where_less(l, low, set1(0), exp(sub(l, shift)));
    store(to, e);
    total = add(total, e);
  };
  float last[16];
  for (int j = 0; j < 16; j++) last[j] = n / 16 * 16 + j < n ? logits[n / 16 * 16 + j] : -__builtin_inff();
  for (int64_t i = 0; i + 16 <= n; i += 16) each(logits + i, out + i);
  each(last, last);
  const V all = is_sigmoid ? set1(1) : set1(sum(total));
  for (int64_t i = 0; i + 16 <= n && !is_sigmoid; i += 16) store(out + i, div(load(out + i), all));
  store(last, div(load(last), all));
  for (int64_t i = n / 16 * 16; i < n; i++) out[i] = last[i % 16];
}

}  // namespace
