// Floats and weights as tiles of bf16 (kernels.h has their layouts), for the levels that multiply them: such a level
// defines multiply_tiles.
#pragma once

#include "tiles.inl"
#include "vector_bf16.h"

namespace {

using mh::kTileNumbers;

void multiply_tiles(const mh::TileProduct&);

void left_tiles(const float* from, int64_t stride, int64_t rows, bool second, uint16_t* to, int64_t step) {
  for (int64_t i = 0; i < rows; i += 16, to += step) {
    uint16_t* half = to + 16 * second;
    const int64_t n = least(16, rows - i);
    for (int64_t j = 0; j < n; j++) store_rounded(half + 32 * j, load(from + (i + j) * stride));
    for (int64_t j = n; j < 16; j++) __builtin_memset(half + 32 * j, 0, 32);
  }
}

void right_tiles(const float* from, int64_t stride, int64_t rows, uint16_t* to) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2, from += 2 * stride, to += 32)
    store_pairs(reinterpret_cast<uint8_t*>(to), load(from), load(from + stride));
  for (const int64_t end = (rows + 31) / 32 * 32; i < end; i += 2, to += 32)
    store_pairs(reinterpret_cast<uint8_t*>(to), i < rows ? load(from) : set1(0), set1(0));
}

// Sixteen outputs by sixteen inputs of weights as half a tile.
inline void half_tile(const float* from, int64_t stride, uint16_t* to) {
  times<8>([&](auto i) {
    store_pairs(reinterpret_cast<uint8_t*>(to + 32 * i.value), load(from + 2 * i.value * stride),
                load(from + (2 * i.value + 1) * stride));
  });
}

void column_tiles(const Columns& w, float* scratch, uint16_t* to) {
  const int64_t depth = (w.count + 1) / 2;
  for (int64_t p = 0; p < w.count; p++) {
    const Panel& panel = w.panels[p];
    const bool whole = panel.format == MH_PLAIN_ROUNDED && panel.rows == 16;
    const float* weights = reinterpret_cast<const float*>(panel.data);
    for (int64_t i = 0; whole && p + 1 < w.count && i < 16; i++)  // the next panel's, while this one is rounded
      for (int64_t q = 0; q < w.blocks; q++)
        __builtin_prefetch(reinterpret_cast<const float*>(w.panels[p + 1].data) + i * panel.inputs +
                           16 * (w.block + q));
    for (int64_t q = 0; q < w.blocks; q++) {
      uint16_t* half = to + (q * depth + p / 2) * kTileNumbers + p % 2 * (kTileNumbers / 2);
      const int64_t column = 16 * (w.block + q);
      if (whole && column + 16 <= panel.inputs) {
        half_tile(weights + column, panel.inputs, half);
        continue;
      }
      transposed_block(panel, w.block + q, scratch + kChunk * 16, scratch);
      half_tile(scratch, 16, half);
    }
  }
  for (int64_t q = 0; w.count % 2 && q < w.blocks; q++)
    __builtin_memset(to + (q + 1) * depth * kTileNumbers - kTileNumbers / 2, 0, kTileNumbers);  // half, in bytes
}

void turn_tiles(const uint16_t* right, int64_t count, uint16_t* left) {  // a pair of bf16 moves as one float
  for (int64_t i = 0; i < count * kTileNumbers; i += kTileNumbers)
    transpose16(reinterpret_cast<const float*>(right + i), 16, reinterpret_cast<float*>(left + i));
}

constexpr mh::TileKernels kTileKernels = {left_tiles, right_tiles, column_tiles, turn_tiles, multiply_tiles};

}  // namespace
