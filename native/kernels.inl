// The kernels in terms of a level's sixteen-float vector. Each level's file includes its vector and then this.
// Everything is in an unnamed namespace, and nothing of the standard library is used that could be shared between
// object files: the linker would keep one copy, perhaps one that this CPU cannot run.
#pragma once

#include "activation.inl"
#include "kernels.h"
#include "manyhands.h"

namespace {

using mh::kChunk;
using mh::Panel;
using mh::Row;
using mh::Rows;

constexpr int64_t kAhead = 2048;  // bytes prefetched ahead; 512 and 4096 were up to a tenth slower (Zen 3)

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- The vector path: few rows, the panel read once as it is stored. ----

template <int M>
void dot_float32(const Panel& p, const Row* rows, float* c) {
  V even[M], odd[M];
  for (int i = 0; i < M; i++) even[i] = odd[i] = set1(0);
  const float* w = reinterpret_cast<const float*>(p.data);
  for (int64_t k = 0; k < p.depth; k += 2, w += 32) {
    prefetch(reinterpret_cast<const uint8_t*>(w) + kAhead), prefetch(reinterpret_cast<const uint8_t*>(w) + kAhead + 64);
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
    prefetch(line + kAhead);
    V w0, w1;
    load_pairs(line, w0, w1);
    for (int i = 0; i < M; i++) {
      even[i] = fma(set1(rows[i].x[k]), w0, even[i]);
      odd[i] = fma(set1(rows[i].x[k + 1]), w1, odd[i]);
    }
  }
  for (int i = 0; i < M; i++) store(c + 16 * i, add(even[i], odd[i]));
}

template <int M>
void dot_int8(const Panel& p, const Row* rows, float* c) {
  V sums[M];
  for (int i = 0; i < M; i++) sums[i] = set1(0);
  const uint8_t* line = p.data;
  for (int64_t k = 0, g = 0; k < p.depth; g++) {
    I dots[M];
    for (int i = 0; i < M; i++) dots[i] = zero_int();
    for (int64_t end = k + mh::kQuantGroup; k < end; k += 4, line += 64) {
      prefetch(line + kAhead);
      for (int i = 0; i < M; i++) dots[i] = dot_int8(dots[i], line, rows[i].q + k);
    }
    for (int i = 0; i < M; i++) sums[i] = fma(to_float(dots[i]), set1(rows[i].scale[g]), sums[i]);
  }
  const V scale = load(reinterpret_cast<const float*>(p.scales));
  for (int i = 0; i < M; i++) store(c + 16 * i, mul(sums[i], scale));
}

template <int M>
void dot_int4(const Panel& p, const Row* rows, float* c) {
  V sums[M];
  for (int i = 0; i < M; i++) sums[i] = set1(0);
  const uint8_t* lines = p.data;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(p.scales);
  for (int64_t k = 0, g = 0; k < p.depth; g++, scales += 16) {
    I dots[M];
    for (int i = 0; i < M; i++) dots[i] = zero_int();
    for (int64_t end = k + p.group; k < end; k += 32, lines += 256) {
      for (int l = 0; l < 256; l += 64) prefetch(lines + kAhead + l);
      for (int i = 0; i < M; i++) dots[i] = dot_int4(dots[i], lines, rows[i].q + k);
    }
    const V scale = load_bf16(scales);
    for (int i = 0; i < M; i++) {
      const V x = sub(mul(to_float(dots[i]), set1(rows[i].scale[g])), set1(rows[i].offset[g]));
      sums[i] = fma(x, scale, sums[i]);
    }
  }
  for (int i = 0; i < M; i++) store(c + 16 * i, sums[i]);
}

template <int M>
void dot_rows(const Panel& p, const Row* rows, float* c) {
  switch (p.format) {
    case MH_FLOAT32: return dot_float32<M>(p, rows, c);
    case MH_BF16: return dot_bf16<M>(p, rows, c);
    case MH_INT8: return dot_int8<M>(p, rows, c);
    default: return dot_int4<M>(p, rows, c);
  }
}

void dot(const Panel& p, const Row* rows, int count, float* c) {
  switch (count) {
    case 1: return dot_rows<1>(p, rows, c);
    case 2: return dot_rows<2>(p, rows, c);
    case 3: return dot_rows<3>(p, rows, c);
    default: return dot_rows<4>(p, rows, c);
  }
}

// ---- The matrix path: a chunk of the panel as float32, then tiles of a few rows by sixteen columns. ----

// Sixteen outputs by sixteen inputs from k on of plain weights, row by row; zeros where there are none.
const float* plain_block(const Panel& p, int64_t k, float* out, int64_t* stride) {
  const bool whole = p.rows == 16 && k + 16 <= p.inputs, halves = p.format == MH_PLAIN_BF16;
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
      store(row, halves ? load_bf16(bf16 + i * p.inputs) : load(floats + i * p.inputs));
    } else {
      for (int64_t j = 0; j < columns; j++) {
        const uint32_t bits = halves ? static_cast<uint32_t>(bf16[i * p.inputs + j]) << 16 : 0;
        halves ? void(__builtin_memcpy(row + j, &bits, 4)) : void(row[j] = floats[i * p.inputs + j]);
      }
    }
    if (p.format != MH_PLAIN_ROUNDED) continue;
    store_bf16(rounded, load(row));
    store(row, load_bf16(rounded));
  }
  return out;
}

inline bool is_plain(const Panel& p) { return p.format >= MH_PLAIN_FLOAT32; }

// Inputs [k, k + n) of a panel as [n][16] floats; float32 panels are used where they lie. k and n are multiples of 16.
const float* widen_panel(const Panel& p, int64_t k, int64_t n, float* out) {
  if (p.format == MH_FLOAT32) return reinterpret_cast<const float*>(p.data) + 16 * k;
  float* to = out;
  if (is_plain(p)) {
    float block[256];
    for (int64_t i = 0; i < n; i += 16, to += 256) {
      int64_t stride;
      const float* from = plain_block(p, k + i, block, &stride);
      transpose16(from, stride, to);
    }
  } else if (p.format == MH_BF16) {
    const uint8_t* line = p.data + 32 * k;
    for (int64_t i = 0; i < n; i += 2, line += 64, to += 32) {
      V first, second;
      load_pairs(line, first, second);
      store(to, first), store(to + 16, second);
    }
  } else if (p.format == MH_INT8) {
    const V scale = load(reinterpret_cast<const float*>(p.scales));
    const uint8_t* line = p.data + 16 * k;
    for (int64_t i = 0; i < n; i += 4, line += 64, to += 64) {
      V w[4];
      load_quads(line, w);
      for (int j = 0; j < 4; j++) store(to + 16 * j, mul(w[j], scale));
    }
  } else {
    const uint8_t* line = p.data + 8 * k;
    for (int64_t i = 0; i < n; i += 8, line += 64, to += 128) {
      const V scale = load_bf16(reinterpret_cast<const uint16_t*>(p.scales) + 16 * ((k + i) / p.group));
      V w[8];
      load_octets(line, w);
      for (int j = 0; j < 8; j++) store(to + 16 * j, mul(w[j], scale));
    }
  }
  return out;
}

template <int M>
void tile(const float* const* rows, int64_t k0, int64_t n, const float* b, float* c, bool first) {
  V sums[M];
  const float* a[M];
  for (int i = 0; i < M; i++) {
    sums[i] = first ? set1(0) : load(c + 16 * i);
    a[i] = rows[i] + k0;
  }
  for (int64_t k = 0; k < n; k++) {
    const V w = load(b + 16 * k);
    for (int i = 0; i < M; i++) sums[i] = fma(set1(a[i][k]), w, sums[i]);
  }
  for (int i = 0; i < M; i++) store(c + 16 * i, sums[i]);
}

template <int M>
void tile_rest(int64_t m, const float* const* rows, int64_t k0, int64_t n, const float* b, float* c, bool first) {
  if (m == M) return tile<M>(rows, k0, n, b, c, first);
  if constexpr (M > 1) tile_rest<M - 1>(m, rows, k0, n, b, c, first);
}

void tiles(const Rows& rows, int64_t k0, int64_t n, const float* b, float* c, bool first) {
  int64_t i = 0;
  for (; i + kTileRows <= rows.count; i += kTileRows) tile<kTileRows>(rows.at + i, k0, n, b, c + 16 * i, first);
  if (i < rows.count) tile_rest<kTileRows - 1>(rows.count - i, rows.at + i, k0, n, b, c + 16 * i, first);
}

void product(const Panel& p, const Rows& rows, float* scratch, float* c) {
  for (int64_t k = 0; k < p.depth; k += kChunk) {
    const int64_t n = least(kChunk, p.depth - k);
    tiles(rows, k, n, widen_panel(p, k, n, scratch), c, k == 0);
  }
}

// Sixteen outputs by sixteen inputs, row by row and contiguous.
void turned_block(const Panel& p, int64_t block, float* room, float* out) {
  if (!is_plain(p)) return transpose16(widen_panel(p, block * 16, 16, room), 16, out);
  int64_t stride;
  const float* from = plain_block(p, block * 16, out, &stride);
  for (int64_t i = 0; from != out && i < 16; i++) store(out + 16 * i, load(from + i * stride));
}

void product_t(const Panel* panels, int64_t all, int64_t block, const Rows& rows, float* scratch, float* c) {
  constexpr int64_t step = kChunk / 16;
  float* narrow = scratch + kChunk * 16;
  for (int64_t p = 0; p < all; p += step) {
    const int64_t count = least(step, all - p);
    for (int64_t j = 0; j < count; j++) turned_block(panels[p + j], block, narrow, scratch + 256 * j);
    tiles(rows, p * 16, count * 16, scratch, c, p == 0);
  }
}

template <int M>
void outer_tile(const float* a, const float* b, int64_t m, float* c, int64_t stride, bool first) {
  V sums[M];
  for (int i = 0; i < M; i++) sums[i] = first ? set1(0) : load(c + stride * i);
  for (int64_t k = 0; k < m; k++) {
    const V w = load(b + 16 * k);
    for (int i = 0; i < M; i++) sums[i] = fma(set1(a[16 * k + i]), w, sums[i]);
  }
  for (int i = 0; i < M; i++) store(c + stride * i, sums[i]);
}

void outer(const float* a, const float* b, int64_t m, float* c, int64_t stride, bool first) {
  constexpr int whole = 16 / kOuterRows * kOuterRows, rest = 16 % kOuterRows;
  for (int i = 0; i < whole; i += kOuterRows) outer_tile<kOuterRows>(a + i, b, m, c + i * stride, stride, first);
  if constexpr (rest != 0) outer_tile<rest>(a + whole, b, m, c + whole * stride, stride, first);
}

// ---- Rows. ----

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

// x ≈ scale · q with q in [-127, 127], group by group; n is a multiple of the group. A group that is not finite gets
// a NaN scale, so that its rows come out as NaN and not as something plausible.
void quantize(const float* x, int64_t n, int64_t group, int8_t* q, float* scale, float* offset) {
  for (int64_t g = 0; g < n / group; g++, x += group, q += group) {
    V most = set1(0), nothing = set1(0);  // 0 · x: `max` forgets a NaN at the next number, a sum does not
    for (int64_t k = 0; k < group; k += 16) {
      const V y = load(x + k);
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
    int32_t total = 0;
    for (int64_t k = 0; k < group; k += 16) {
      store(lanes, round(mul(load(x + k), inverse)));
      for (int j = 0; j < 16; j++) {
        const int8_t value = finite ? static_cast<int8_t>(lanes[j]) : int8_t{0};
        q[k + j] = value;
        total += value;
      }
    }
    scale[g] = finite ? largest / 127.0f : __builtin_nanf("");
    offset[g] = finite ? 8.0f * scale[g] * static_cast<float>(total) : scale[g];
  }
}

void add_bias(const float* bias, int64_t columns, int64_t rows, float* c) {
  for (int64_t i = 0; i < rows; i++, c += 16)
    for (int64_t j = 0; j < columns; j++) c[j] += bias[j];
}

void combine(const float* c, int64_t rows, int64_t columns, const float* bias, const float* weight,
             const int64_t* places, int64_t stride, float* y) {
  float padded[16] = {};
  for (int64_t j = 0; bias && j < columns; j++) padded[j] = bias[j];
  const V b = load(padded);
  for (int64_t i = 0; i < rows; i++, c += 16) {
    float* to = y + places[i] * stride;
    const V x = add(load(c), b), w = set1(weight ? weight[i] : 1.0f);
    if (columns == 16) {
      store(to, fma(w, x, load(to)));
    } else {
      float last[16] = {};
      for (int64_t j = 0; j < columns; j++) last[j] = to[j];
      store(last, fma(w, x, load(last)));
      for (int64_t j = 0; j < columns; j++) to[j] = last[j];
    }
  }
}

}  // namespace
