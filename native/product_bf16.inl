// The matrix path in bf16, rows and weights, with float32 sums, for the levels that have instructions for it. All is
// tiles of 1 KB: a left one is 16 rows by 32 inputs, [16][32]; a right one is 32 inputs by 16 columns in pairs of
// inputs, [16][16][2]. A panel of a record is right tiles as it lies, so that rows are left ones. Plain weights,
// [outputs][inputs], are left tiles as they lie: rows are right ones, and the product comes out across and is turned.
//
// A level defines `TileScope`, alive while its instructions are used, and `corner<M, N>`.
#pragma once

#include "kernels.inl"
#include "vector_bf16.h"

namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileChunk = 256;  // inputs of two panels that stay in the first cache, 16 KB

struct Tiles {  // one or two operands of as many tiles as there are steps
  const uint8_t* at[2];
  int64_t step, stride;  // bytes to the next tile, and to the next of a tile's 16 rows
};

struct Fetch {  // what will be multiplied next, some lines of the cache at each step
  Prefetcher& next;
  int64_t lines;
  void operator()() const {
    for (int64_t left = lines; left > 0 && next.piece < next.count;) {
      const int64_t n = least(left, (next.bytes - next.done + 63) / 64);
      const uint8_t* at = next.pieces[next.piece] + next.done;
      for (int64_t i = 0; i < n; i++) __builtin_prefetch(at + 64 * i, 0, 2);
      next.done += 64 * n, left -= n;
      if (next.done >= next.bytes) next.piece++, next.done = 0;
    }
  }
};

struct Corner {  // c[i][j] [16][16] = or += left tiles i times right tiles j
  Tiles left, right;
  int64_t steps;
  float* c[2][2];
  bool first;
  int64_t rows;  // of the left tiles, which are wanted: 1 to 16 · M
};

template <int M, int N>
void corner(const Corner&, const Fetch&);

void any_corner(int64_t m, int64_t n, const Corner& c, const Fetch& fetch) {
  if (m == 2) return n == 2 ? corner<2, 2>(c, fetch) : corner<2, 1>(c, fetch);
  n == 2 ? corner<1, 2>(c, fetch) : corner<1, 1>(c, fetch);
}

// Inputs [k, k + n) of plain weights as left tiles, with zeros where there are none: [n / 32][16][32].
void copy_plain(const Panel& p, int64_t k, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; i += 32, to += kTileBytes)
    for (int64_t o = 0; o < 16; o++) {
      uint16_t* row = reinterpret_cast<uint16_t*>(to) + 32 * o;
      const int64_t there = o < p.rows ? least(32, p.inputs - k - i) : 0;
      if (there < 32) __builtin_memset(row, 0, 64);
      if (there <= 0) continue;
      const uint8_t* from = p.data + (o * p.inputs + k + i) * mh::kFormats[p.format].bits / 8;
      if (p.format == MH_PLAIN_BF16)
        __builtin_memcpy(row, from, there * 2);
      else
        narrow(reinterpret_cast<const float*>(from), there, row);
    }
}

// Inputs [k, k + n) of one or two panels, where they lie or as tiles in `scratch`.
Tiles weight_tiles(const Panel* panels, int64_t count, int64_t k, int64_t n, uint8_t* scratch) {
  if (!is_plain(*panels)) return {{panels[0].data + 32 * k, panels[count - 1].data + 32 * k}, kTileBytes, 64};
  bool whole = panels->format == MH_PLAIN_BF16 && k + n <= panels->inputs;
  for (int64_t i = 0; i < count; i++) whole = whole && panels[i].rows == 16;
  if (whole) return {{panels[0].data + 2 * k, panels[count - 1].data + 2 * k}, 64, 2 * panels->inputs};
  uint8_t* second = scratch + kTileChunk / 32 * kTileBytes;
  copy_plain(panels[0], k, n, scratch);
  if (count == 2) copy_plain(panels[1], k, n, second);
  return {{scratch, second}, kTileBytes, 64};
}

// One or two panels: c of the second c_stride after the first's.
void pair_of_panels(const Panel* panels, int64_t count, const mh::TileRows& rows, uint8_t* scratch, float* c,
                    int64_t c_stride) {
  const int64_t depth = panels->depth, all = (rows.count + 15) / 16, pairs = (all + 1) / 2;
  const bool across = is_plain(*panels);
  Panel then[2];
  int64_t following = 0;
  for (const Panel* p = panels[count - 1].next; p && following < 2; p = p->next) then[following++] = *p;
  Prefetcher prefetcher(then, following, 0, depth);
  const int64_t corners = depth / 32 * pairs;
  const Fetch fetch{prefetcher, (prefetcher.count * ((prefetcher.bytes + 63) / 64) + corners - 1) / corners};
  for (int64_t k = 0; k < depth; k += kTileChunk) {
    const int64_t n = least(kTileChunk, depth - k);
    const Tiles weights = weight_tiles(panels, count, k, n, scratch);
    for (int64_t t = 0; t < all; t += 2) {
      const uint8_t* at = reinterpret_cast<const uint8_t*>(rows.tiles) + (t * depth + k) * 32;
      const Tiles x{{at, at + depth * 32}, kTileBytes, 64};
      const int64_t m = least(2, all - t);
      float turned[2][2][256], *to = c + 256 * t;
      const bool turn = across && k + n == depth;
      Corner now{across ? weights : x, across ? x : weights, n / 32, {}, k == 0, least(32, rows.count - 16 * t)};
      if (across) now.rows = 16 * count;
      for (int64_t i = 0; i < 2; i++)
        for (int64_t j = 0; j < 2; j++) now.c[i][j] = to + (across ? i * c_stride + 256 * j : j * c_stride + 256 * i);
      any_corner(across ? count : m, across ? m : count, now, fetch);
      for (int64_t i = 0; turn && i < count; i++)
        for (int64_t j = 0; j < m; j++) {
          __builtin_memcpy(turned[i][j], now.c[i][j], 1024);
          transpose16(turned[i][j], 16, now.c[i][j]);
        }
    }
  }
}

void product_tiles(const Panel* panels, int64_t count, const mh::TileRows& rows, float* scratch, float* c,
                   int64_t c_stride) {
  const TileScope scope;
  for (int64_t p = 0; p < count; p += 2)
    pair_of_panels(panels + p, least(2, count - p), rows, reinterpret_cast<uint8_t*>(scratch), c + p * c_stride,
                   c_stride);
}

void lay_rows(const uint16_t* const* at, int64_t count, int64_t depth, bool right, uint16_t* tiles) {
  alignas(64) float tile[256];
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t k = 0; k < depth; k += 32, tiles += kTileBytes / 2) {
      float* to = right ? tile : reinterpret_cast<float*>(tiles);
      const int64_t n = least(16, count - i);
      for (int64_t j = 0; j < n; j++) __builtin_memcpy(to + 16 * j, at[i + j] + k, 64);
      if (n < 16) __builtin_memset(to + 16 * n, 0, 64 * (16 - n));
      if (right) transpose16(tile, 16, reinterpret_cast<float*>(tiles));
    }
}

void lay_columns(const float* c, int64_t count, int64_t column, int64_t depth, bool right, uint16_t* tiles) {
  alignas(64) float tile[256], turned[256];
  tiles += column / 32 * 512;
  for (int64_t i = 0; i < count; i += 16, c += 256, tiles += 16 * depth) {
    const int64_t n = least(16, count - i);
    uint16_t* half = tiles + (right ? column % 32 * 16 : column % 32);
    if (!right) {
      for (int64_t j = 0; j < n; j++) store_bf16(half + 32 * j, load(c + 16 * j));
      for (int64_t j = n; j < 16; j++) __builtin_memset(half + 32 * j, 0, 32);
      continue;
    }
    if (n < 16) __builtin_memcpy(tile, c, 64 * n), __builtin_memset(tile + 16 * n, 0, 64 * (16 - n));
    transpose16(n < 16 ? tile : c, 16, turned);
    for (int j = 0; j < 8; j++)
      store_pairs(reinterpret_cast<uint8_t*>(half + 32 * j), load(turned + 32 * j), load(turned + 32 * j + 16));
  }
}

}  // namespace
