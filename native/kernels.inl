// The kernels in terms of a level's sixteen-float vector. Each level's file includes its vector and then this.
// Everything is in an unnamed namespace, and nothing of the standard library is used that could be shared between
// object files: the linker would keep one copy, perhaps one that this CPU cannot run.
#pragma once

#include "activation.inl"
#include "kernels.h"
#include "manyhands.h"
#include "step.inl"

namespace {

using mh::Columns;
using mh::kChunk;
using mh::Panel;
using mh::Row;
using mh::Rows;

constexpr int64_t kPrefetchBytes = 2048;  // bytes prefetched ahead; 512 and 4096 were up to a tenth slower (Zen 3)

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// f(Number<0>), f(Number<1>), ... Of a loop gcc 12 makes the same only sometimes, and else keeps a tile's sums in
// memory.
template <int N>
struct Number {
  static constexpr int value = N;
};
template <int N, class F>
inline __attribute__((always_inline)) void times(const F& f) {
  if constexpr (N > 0) {
    times<N - 1>(f);
    f(Number<N - 1>{});
  }
}

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

template <int M>
void dot_int8(const Panel& p, const Row* rows, float* c) {
  prefetch(p.scales);  // they lie elsewhere, and are needed last
  V sums[M];
  for (int i = 0; i < M; i++) sums[i] = set1(0);
  const uint8_t* line = p.data;
  for (int64_t k = 0, g = 0; k < p.depth; g++) {
    I dots[M];
    for (int i = 0; i < M; i++) dots[i] = zero_int();
    for (int64_t end = k + mh::kQuantGroup; k < end; k += 4, line += 64) {
      prefetch(line + kPrefetchBytes);
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
      for (int l = 0; l < 256; l += 64) prefetch(lines + kPrefetchBytes + l);
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

// ---- The matrix path: a chunk of the panel as float32, then tiles of a few rows by sixteen columns. ----

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

// Weights to be fetched to the second cache while others are multiplied: inputs [k, k + n) of some panels.
struct Prefetcher {
  const uint8_t* pieces[kChunk];
  int64_t count = 0, bytes = 0, piece = 0, done = 0;

  Prefetcher(const Panel* panels, int64_t panel_count, int64_t k, int64_t n) {
    static const int64_t bits[] = {32, 16, 8, 4, 32, 16, 32};
    if (!panel_count || k >= panels->inputs) return;
    const bool plain = is_plain(*panels);
    const int64_t width = bits[panels->format] * (plain ? 1 : 16);
    bytes = least(n, panels->inputs - k) * width / 8;
    for (const Panel* p = panels; p < panels + panel_count; p++)
      for (int64_t i = 0; i < (plain ? p->rows : 1); i++) pieces[count++] = p->data + (i * p->inputs + k) * width / 8;
  }
  void next_line() {
    if (piece == count) return;
    __builtin_prefetch(pieces[piece] + done, 0, 2);
    done += 64;
    const bool over = done >= bytes;
    piece += over, done = over ? 0 : done;
  }
  void catch_up(int64_t steps) {  // what does not fit in so many steps is fetched at once
    for (int64_t i = (count - piece) * ((bytes + 63) / 64); i > steps; i--) next_line();
  }
};

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

template <class T, int N>
void plain_outputs(const Panel& p, int64_t output, const Row* rows, int count, float* c, Prefetcher& prefetcher) {
  const T* w = reinterpret_cast<const T*>(p.data) + output * p.inputs;
  const int64_t whole = p.inputs / 16 * 16;
  float last[N * 16] = {};
  for (int64_t o = 0; o < N; o++)
    for (int64_t k = whole; k < p.inputs; k++) last[16 * o + k - whole] = number(w[o * p.inputs + k]);
  c += output;
  if (count == 1) return plain_tile<1, N>(rows, w, p.inputs, last, c, prefetcher);
  if (count == 3) return plain_tile<3, N>(rows, w, p.inputs, last, c, prefetcher);
  plain_tile<2, N>(rows, w, p.inputs, last, c, prefetcher);
  if (count == 4) plain_tile<2, N>(rows + 2, w, p.inputs, last, c + 32, prefetcher);
}

// For a few rows. At 8 it has 44 GFLOP/s where tiles have 54, at 16 they have 74.
template <class T>
void dot_plain(const Panel& p, const Row* rows, int count, float* c) {
  Prefetcher prefetcher(p.next, p.next ? 1 : 0, 0, p.inputs);
  int64_t o = 0;
  for (; o + 2 <= p.rows; o += 2) plain_outputs<T, 2>(p, o, rows, count, c, prefetcher);
  if (o < p.rows) plain_outputs<T, 1>(p, o++, rows, count, c, prefetcher);
  for (; o < 16; o++)
    for (int i = 0; i < count; i++) c[16 * i + o] = 0;
}

void dot(const Panel& p, const Row* rows, int count, float* c) {
  if (p.format == MH_PLAIN_FLOAT32) return dot_plain<float>(p, rows, count, c);
  if (p.format == MH_PLAIN_BF16) return dot_plain<uint16_t>(p, rows, count, c);
  switch (count) {
    case 1: return dot_rows<1>(p, rows, c);
    case 2: return dot_rows<2>(p, rows, c);
    case 3: return dot_rows<3>(p, rows, c);
    default: return dot_rows<4>(p, rows, c);
  }
}

// A tile's weights, [n][16]: at `b`; or still as `panels` of plain floats have them, from where the first tile that
// takes them writes them to `b`. A pass of its own for that cost 6 % at 64 rows.
struct Weights {
  float* b;
  const Panel* panels;
  int64_t column;
};

constexpr int64_t kStep = 4;  // inputs of a tile per line fetched

// M rows by 16 columns. Groups of 16 inputs lie `jump` floats apart in a.
template <int M, bool kTurn>
void tile(const float* a, int64_t jump, int64_t n, const Weights& weights, float* c, bool first,
          Prefetcher& prefetcher) {
  V sums[M];
  times<M>([&](auto i) { sums[i.value] = first ? set1(0) : load(c + 16 * i.value); });
  float* b = weights.b;
  const float* from = nullptr;
  const int64_t stride = kTurn ? weights.panels->inputs : 16;
  for (int64_t k = 0; k < n; k += kStep, b += 16 * kStep) {
    prefetcher.next_line();
    if (kTurn)
      from =
          k % 16 ? from + kStep * stride : reinterpret_cast<const float*>(weights.panels[k / 16].data) + weights.column;
    times<kStep>([&](auto j) {
      const V w = load(kTurn ? from + j.value * stride : b + 16 * j.value);
      if (kTurn) store(b + 16 * j.value, w);
      times<M>([&](auto i) { sums[i.value] = fma(set1(a[16 * i.value + j.value]), w, sums[i.value]); });
    });
    a += (k + kStep) % 16 ? kStep : jump - 16 + kStep;
  }
  times<M>([&](auto i) { store(c + 16 * i.value, sums[i.value]); });
}

template <int M, bool kTurn>
void tile_of(int64_t m, const float* a, int64_t jump, int64_t n, const Weights& w, float* c, bool first,
             Prefetcher& prefetcher) {
  if (m == M) return tile<M, kTurn>(a, jump, n, w, c, first, prefetcher);
  if constexpr (M > 1) tile_of<M - 1, kTurn>(m, a, jump, n, w, c, first, prefetcher);
}

inline int64_t tile_count(const Rows& rows) { return (rows.count + kTileRows - 1) / kTileRows; }

void tiles(const Rows& rows, int64_t k, int64_t n, const Weights& w, float* c, bool first, Prefetcher& prefetcher) {
  const float* a = rows.at + k * rows.count;
  for (int64_t i = 0, left = rows.count; left > 0;) {
    // Two tiles of half the size rather than a whole one and one too small to keep the multipliers busy.
    const int64_t m = left >= 2 * kTileRows || left <= kTileRows ? least(left, kTileRows) : (left + 1) / 2;
    if (i == 0 && w.panels)
      tile_of<kTileRows, true>(m, a, 16 * rows.count, n, w, c, first, prefetcher);
    else
      tile_of<kTileRows, false>(m, a + 16 * i, 16 * rows.count, n, w, c + 16 * i, first, prefetcher);
    i += m, left -= m;
  }
}

void product(const Panel& p, const Rows& rows, float* scratch, float* c) {
  for (int64_t k = 0; k < p.depth; k += kChunk) {
    const int64_t n = least(kChunk, p.depth - k);
    const bool last = k + n >= p.depth;
    Prefetcher prefetcher(last ? p.next : &p, last && !p.next ? 0 : 1, last ? 0 : k + n, kChunk);
    prefetcher.catch_up(tile_count(rows) * n / kStep);
    tiles(rows, k, n, {const_cast<float*>(widen_panel(p, k, n, scratch)), nullptr, 0}, c, k == 0, prefetcher);
  }
}

// Sixteen outputs by sixteen inputs, row by row and contiguous.
void transposed_block(const Panel& p, int64_t block, float* scratch, float* out) {
  if (!is_plain(p)) return transpose16(widen_panel(p, block * 16, 16, scratch), 16, out);
  int64_t stride;
  const float* from = plain_block(p, block * 16, out, &stride);
  for (int64_t i = 0; from != out && i < 16; i++) store(out + 16 * i, load(from + i * stride));
}

void product_transposed(const Columns& w, const Columns& next, const Rows& rows, float* scratch, float* c,
                        int64_t c_stride) {
  constexpr int64_t step = 4;  // panels; of more rows of weights, a power of two apart, the second cache drops some
  for (int64_t p = 0; p < w.count; p += step) {
    const int64_t count = least(step, w.count - p);
    const bool last = p + step >= w.count;
    const Columns& then = last ? next : w;
    const int64_t from = last ? 0 : p + step;
    Prefetcher prefetcher(then.panels + from, least(step, then.count - from), 16 * then.block, 16 * then.blocks);
    prefetcher.catch_up(tile_count(rows) * count * w.blocks * 16 / kStep);
    const Panel* panels = w.panels + p;
    bool whole = panels->format == MH_PLAIN_FLOAT32;
    for (int64_t j = 0; j < count; j++) whole = whole && panels[j].rows == 16;
    for (int64_t q = 0; q < w.blocks; q++) {
      const int64_t column = 16 * (w.block + q);
      const bool as_they_lie = whole && column + 16 <= panels->inputs;
      for (int64_t j = 0; !as_they_lie && j < count; j++)
        transposed_block(panels[j], w.block + q, scratch + kChunk * 16, scratch + 256 * j);
      tiles(rows, p * 16, count * 16, {scratch, as_they_lie ? panels : nullptr, column}, c + q * c_stride, p == 0,
            prefetcher);
    }
  }
}

template <int M>
void outer_tile(const float* a, const float* b, int64_t m, float* c, int64_t stride, bool first) {
  V sums[M];
  times<M>([&](auto i) {
    sums[i.value] = first ? set1(0) : load(c + stride * i.value);
    __builtin_prefetch(c + stride * i.value + 16, 1);  // of the next tile
  });
  for (int64_t k = 0; k < m; k++, a += 16, b += 16) {
    const V w = load(b);
    times<M>([&](auto i) { sums[i.value] = fma(set1(a[i.value]), w, sums[i.value]); });
  }
  times<M>([&](auto i) { store(c + stride * i.value, sums[i.value]); });
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
