// What a level does with each weight format as floats: a few rows times a panel read once as it is stored (`dot`), and
// inputs of a panel for the matrix path (`widen`). Products of integer formats are in integers.inl; their gradients are
// those of the widened weights.
#pragma once

#include "loops.inl"
#include "plain.inl"
#include "prefetch.inl"

namespace {

// ---- The vector path: few rows, the panel read once as it is stored. ----

template <int M>
void dot_float32(const Panel& p, const Row* rows, float* c) {
  V even[M], odd[M];
  for (int i = 0; i < M; i++) even[i] = odd[i] = set1(0);
  const float* w = reinterpret_cast<const float*>(p.data);
  for (int64_t k = 0; k < p.depth; k += 2, w += 32) {
    prefetch(reinterpret_cast<const uint8_t*>(w) + kPrefetchBytes),
        prefetch(reinterpret_cast<const uint8_t*>(w) + kPrefetchBytes + 64);
    const V w0 = load(w), w1 = load(w + 16);
    for (int i = 0; i < M; i++) {
      even[i] = fma(set1(rows[i].x[k]), w0, even[i]);
      odd[i] = fma(set1(rows[i].x[k + 1]), w1, odd[i]);
    }
  }
  for (int i = 0; i < M; i++) store(c + 16 * i, add(even[i], odd[i]));
}

template <int M>
void dot_bf16(const Panel& p, const Row* rows, float* c) {
  V even[M], odd[M];
  for (int i = 0; i < M; i++) even[i] = odd[i] = set1(0);
  const uint8_t* line = p.data;
  for (int64_t k = 0; k < p.depth; k += 2, line += 64) {
    prefetch(line + kPrefetchBytes);
    V w0, w1;
    load_pairs(line, w0, w1);
    for (int i = 0; i < M; i++) {
      even[i] = fma(set1(rows[i].x[k]), w0, even[i]);
      odd[i] = fma(set1(rows[i].x[k + 1]), w1, odd[i]);
    }
  }
  for (int i = 0; i < M; i++) store(c + 16 * i, add(even[i], odd[i]));
}

// ---- As floats. ----

// Sixteen scales of two bytes, of a format whose groups have them.
template <int kFormat>
inline V load_scale(const uint16_t* p) {
  if constexpr (mh::kFormats[kFormat].half) return load_half(p);
  return load_bf16(p);
}

void widen_plain(const Panel& p, int64_t k, int64_t n, float* out) {
  float block[256];
  for (int64_t i = 0; i < n; i += 16, out += 256) {
    int64_t stride;
    const float* from = plain_block(p, k + i, block, &stride);
    transpose16(from, stride, out);
  }
}

void widen_bf16(const Panel& p, int64_t k, int64_t n, float* out) {
  const uint8_t* line = p.data + 32 * k;
  for (int64_t i = 0; i < n; i += 2, line += 64, out += 32) {
    V first, second;
    load_pairs(line, first, second);
    store(out, first), store(out + 16, second);
  }
}

void widen_int8(const Panel& p, int64_t k, int64_t n, float* out) {
  const V scale = load(reinterpret_cast<const float*>(p.scales));
  const uint8_t* line = p.data + 16 * k;
  for (int64_t i = 0; i < n; i += 4, line += 64, out += 64) {
    V w[4];
    load_quads(line, w);
    for (int j = 0; j < 4; j++) store(out + 16 * j, mul(w[j], scale));
  }
}

template <int kFormat>
void widen_nibbles(const Panel& p, int64_t k, int64_t n, float* out) {
  const uint8_t* line = p.data + 8 * k;
  for (int64_t i = 0; i < n; i += 8, line += 64, out += 128) {
    const V scale = load_scale<kFormat>(reinterpret_cast<const uint16_t*>(p.scales) + 16 * ((k + i) / p.group));
    V w[8];
    load_octets(line, w);
    for (int j = 0; j < 8; j++) store(out + 16 * j, mul(w[j], scale));
  }
}

void widen_q8_0(const Panel& p, int64_t k, int64_t n, float* out) {
  const uint8_t* line = p.data + 16 * k;
  for (int64_t i = 0; i < n; i += 4, line += 64, out += 64) {
    const V scale = load_scale<MH_Q8_0>(reinterpret_cast<const uint16_t*>(p.scales) + 16 * ((k + i) / p.group));
    V w[4];
    load_quads(line, w);
    for (int j = 0; j < 4; j++) store(out + 16 * j, mul(w[j], scale));
  }
}

// ---- The table. ----

struct FormatKernels {
  // c [M][16] of M = 1, 2, … rows; null where the format's few_rows is 0
  void (*dot[mh::kDotRows])(const Panel&, const Row*, float* c);
  // Inputs [k, k + n) as [n][16] floats, k and n multiples of 16; null where they lie like that already.
  void (*widen)(const Panel&, int64_t k, int64_t n, float* out);
};

constexpr FormatKernels kFormatKernels[] = {
    {{dot_float32<1>, dot_float32<2>, dot_float32<3>, dot_float32<4>}, nullptr},
    {{dot_bf16<1>, dot_bf16<2>, dot_bf16<3>, dot_bf16<4>}, widen_bf16},
    {{}, widen_int8},
    {{}, widen_nibbles<MH_INT4>},
    {{}, widen_q8_0},
    {{}, widen_nibbles<MH_Q4_0>},
    {{dot_plain<float, 1>, dot_plain<float, 2>, dot_plain<float, 3>, dot_plain<float, 4>}, widen_plain},
    {{dot_plain<uint16_t, 1>, dot_plain<uint16_t, 2>, dot_plain<uint16_t, 3>, dot_plain<uint16_t, 4>}, widen_plain},
    {{}, widen_plain},
};
static_assert(sizeof kFormatKernels / sizeof *kFormatKernels == MH_FORMATS, "a row for each row of kFormats");

void dot(const Panel& p, const Row* rows, int count, float* c) { kFormatKernels[p.format].dot[count - 1](p, rows, c); }

// Inputs [k, k + n) of a panel as floats: in `out`, or where they lie.
const float* widen_panel(const Panel& p, int64_t k, int64_t n, float* out) {
  const auto widen = kFormatKernels[p.format].widen;
  if (!widen) return reinterpret_cast<const float*>(p.data) + 16 * k;
  widen(p, k, n, out);
  return out;
}

}  // namespace
