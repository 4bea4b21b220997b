// The matrix path: a chunk of a panel as float32, then tiles of a few rows by sixteen columns.
#pragma once

#include "formats.inl"

namespace {

// A tile's weights, [n][16] at `b`. Where `panels` is not null they are still there, in plain float32 from `column` on,
// and the first tile copies them to `b` while it multiplies: a pass of its own for that cost 6 % at 64 rows.
struct Weights {
  float* b;
  const Panel* panels;
  int64_t column;
};

constexpr int64_t kStep = 4;  // inputs that a tile multiplies for each line it prefetches

// c = or += M rows by 16 columns. Groups of 16 inputs lie `jump` floats apart in a.
template <int M, bool kCopy>
void tile(const float* a, int64_t jump, int64_t n, const Weights& weights, float* c, bool first,
          Prefetcher& prefetcher) {
  V sums[M];
  times<M>([&](auto i) { sums[i.value] = first ? set1(0) : load(c + 16 * i.value); });
  float* b = weights.b;
  const float* from = nullptr;
  const int64_t stride = kCopy ? weights.panels->inputs : 16;
  for (int64_t k = 0; k < n; k += kStep, b += 16 * kStep) {
    prefetcher.next_line();
    if (kCopy)
      from =
          k % 16 ? from + kStep * stride : reinterpret_cast<const float*>(weights.panels[k / 16].data) + weights.column;
    times<kStep>([&](auto j) {
      const V w = load(kCopy ? from + j.value * stride : b + 16 * j.value);
      if (kCopy) store(b + 16 * j.value, w);
      times<M>([&](auto i) { sums[i.value] = fma(set1(a[16 * i.value + j.value]), w, sums[i.value]); });
    });
    a += (k + kStep) % 16 ? kStep : jump - 16 + kStep;
  }
  times<M>([&](auto i) { store(c + 16 * i.value, sums[i.value]); });
}

template <int M, bool kCopy>
void tile_of(int64_t m, const float* a, int64_t jump, int64_t n, const Weights& w, float* c, bool first,
             Prefetcher& prefetcher) {
  if (m == M) return tile<M, kCopy>(a, jump, n, w, c, first, prefetcher);
  if constexpr (M > 1) tile_of<M - 1, kCopy>(m, a, jump, n, w, c, first, prefetcher);
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

// c [count][16] = rows times a panel. While one chunk is multiplied the next one is prefetched, then the next panel's.
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

// Blocks of 16 columns of c = rows times the columns `w` of a matrix, four panels of its outputs at a time.
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

}  // namespace
