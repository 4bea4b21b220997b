// Rows of floats: to bf16 and back, to integers, with a bias, added to their outputs.
#pragma once

#include "loops.inl"

namespace {

void widen(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(to + i, load_bf16(from + i));
  for (; i < n; i++) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}

void narrow(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bf16(to + i, load(from + i));
  if (i == n) return;
  float last[16] = {};
  uint16_t rounded[16];
  for (int64_t j = i; j < n; j++) last[j - i] = from[j];
  store_bf16(rounded, load(last));
  for (int64_t j = i; j < n; j++) to[j] = rounded[j - i];
}

// x ≈ scale · q with q in [-127, 127], group by group. A group that is not finite gets a NaN scale, so that its rows
// come out as NaN and not as something plausible.
void quantize(const float* x, int64_t n, int64_t group, int32_t shift, const mh::IntRow& to) {
  int8_t* q = to.q;
  for (int64_t g = 0, k = 0; k < n; g++) {
    const int64_t end = least(k + group, n);
    V most = set1(0), nothing = set1(0);  // 0 · x: `max` forgets a NaN at the next number, a sum does not
    for (int64_t i = k; i < end; i += 16) {
      const V y = load(x + i);
      most = max(most, abs(y)), nothing = fma(y, set1(0), nothing);
    }
    float lanes[16], largest = 0;
    store(lanes, add(most, nothing));
    bool finite = true;
    for (float lane : lanes) {
      finite = finite && lane <= 3.0e38f;
      largest = lane > largest ? lane : largest;
    }
    const V inverse = set1(finite && largest > 1e-30f ? 127.0f / largest : 0.0f);
    V total = set1(0);
    for (; k < end; k += 16) {
      const V rounded = finite ? round(mul(load(x + k), inverse)) : set1(0);
      store_int8(q + k / 64 * to.q_step + k % 64, rounded);
      total = add(total, rounded);
    }
    to.scale[g * to.stride] = finite ? largest / 127.0f : __builtin_nanf("");
    to.start[g * to.stride] = -shift * static_cast<int32_t>(sum(total));
  }
}

void add_bias(const float* bias, int64_t columns, int64_t rows, float* c) {
  for (int64_t i = 0; i < rows; i++, c += 16)
    for (int64_t j = 0; j < columns; j++) c[j] += bias[j];
}

void combine(const float* c, int64_t c_stride, int64_t rows, int64_t columns, const float* bias, const float* weight,
             const int64_t* places, int64_t stride, float* y) {
  constexpr int64_t ahead = 8;
  float padded[mh::kColumnBlocks * 16] = {};
  for (int64_t j = 0; bias && j < columns; j++) padded[j] = bias[j];
  for (int64_t i = 0; i < rows; i++, c += 16) {
    float* to = y + places[i] * stride;
    const V w = set1(weight ? weight[i] : 1.0f);
    if (i + ahead < rows)
      for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(y + places[i + ahead] * stride + j, 1);
    for (int64_t j = 0; j < columns; j += 16) {
      const V x = add(load(c + j / 16 * c_stride), load(padded + j));
      if (columns - j >= 16) {
        store(to + j, fma(w, x, load(to + j)));
        continue;
      }
      float last[16] = {};
      for (int64_t k = 0; k < columns - j; k++) last[k] = to[j + k];
      store(last, fma(w, x, load(last)));
      for (int64_t k = 0; k < columns - j; k++) to[j + k] = last[k];
    }
  }
}

}  // namespace
