// The activations and their derivatives on sixteen floats, as manyhands/kernels/experts.py defines them.
#pragma once

#include "manyhands.h"

namespace {

// e^x to 2 units in the last place: 2^n · p(r), |r| ≤ ln 2 / 2 (Cephes' coefficients).
inline V exp(V x) {
  x = max(set1(-87.3f), min(set1(88.0f), x));
  const V n = round(mul(x, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1)));
  return mul(p, power2(n));
}

inline V sigmoid(V x) { return div(set1(1), add(set1(1), exp(sub(set1(0), x)))); }
inline V tanh(V x) { return sub(mul(set1(2), sigmoid(add(x, x))), set1(1)); }

// Abramowitz & Stegun 7.1.26, |error| ≤ 1.5e-7: half of (1 + erf(x/√2)), the normal distribution.
inline V normal(V x) {
  const V z = mul(abs(x), set1(0.70710678118654752f));
  const V t = div(set1(1), fma(z, set1(0.3275911f), set1(1)));
  V p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const V tail = mul(mul(mul(p, t), exp(sub(set1(0), mul(z, z)))), set1(0.5f));
  return where_less(x, set1(0), tail, sub(set1(1), tail));
}

struct Gate {  // y = value(gate) and its derivative
  V value, slope;
};

inline Gate gelu(V x) {
  const V cdf = normal(x);
  const V density = mul(set1(0.39894228040143268f), exp(mul(set1(-0.5f), mul(x, x))));
  return {mul(x, cdf), fma(x, density, cdf)};
}

inline Gate gelu_tanh(V x) {
  const V square = mul(x, x), root = set1(0.79788456080286536f);
  const V t = tanh(mul(mul(root, x), fma(set1(0.044715f), square, set1(1))));
  const V half = mul(set1(0.5f), add(set1(1), t));
  const V inner = mul(root, fma(set1(3 * 0.044715f), square, set1(1)));
  const V slope = mul(mul(mul(set1(0.5f), x), sub(set1(1), mul(t, t))), inner);
  return {mul(x, half), add(half, slope)};
}

inline Gate silu(V x, float gain) {
  const V s = sigmoid(mul(set1(gain), x));
  return {mul(x, s), mul(s, fma(mul(set1(gain), x), sub(set1(1), s), set1(1)))};
}

inline Gate relu(V x) {  // the derivative at 0 is 0, as in PyTorch
  return {max(set1(0), x), where_less(set1(0), x, set1(1), set1(0))};
}

struct Activated {
  V y, dgate, dup;  // dy/dgate and dy/dup
};

// Clamps pass the gradient where the value is not outside: PyTorch's rule.
inline Activated activated(int kind, V gate, V up) {
  const V zero = set1(0), one = set1(1);
  if (kind == MH_RELU || kind == MH_GELU) {
    const Gate g = kind == MH_RELU ? relu(gate) : gelu(gate);
    return {g.value, g.slope, zero};
  }
  if (kind == MH_SWIGLU_OAI) {
    const V limit = set1(7.0f), low = set1(-7.0f);
    const Gate g = silu(min(limit, gate), 1.702f);
    const V shifted = add(max(low, min(limit, up)), one);
    const V dup = where_less(limit, up, zero, where_less(up, low, zero, g.value));
    return {mul(g.value, shifted), where_less(limit, gate, zero, mul(g.slope, shifted)), dup};
  }
  const Gate g = kind == MH_GEGLU ? gelu(gate) : kind == MH_GEGLU_TANH ? gelu_tanh(gate) : silu(gate, 1.0f);
  return {mul(g.value, up), mul(g.slope, up), g.value};
}

inline bool is_gated(int kind) { return kind != MH_RELU && kind != MH_GELU; }

void activate(int kind, const float* gate, const float* up, int64_t rows, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i++)
    store(out + i * out_stride, activated(kind, load(gate + 16 * i), load(up + 16 * i)).y);
}

void activate_grad(int kind, const float* h, const float* dact, const float* weight, int64_t rows, float* dh,
                   int64_t dh_part, float* act, float* dweight) {
  const int64_t up = is_gated(kind) ? 16 * rows : 0;
  for (int64_t i = 0; i < rows; i++, h += 16, dh += 16, dact += 16, act += 16) {
    const Activated a = activated(kind, load(h), load(h + up));
    const V w = set1(weight[i]), d = load(dact), dy = mul(d, w);
    dweight[i] += sum(mul(a.y, d));
    store(act, mul(a.y, w));
    store(dh, mul(a.dgate, dy));
    if (up) store(dh + dh_part, mul(a.dup, dy));
  }
}

}  // namespace
