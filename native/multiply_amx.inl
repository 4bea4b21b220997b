// Tiles of bf16 times tiles of bf16 by AMX: two by two, so that each is loaded once for two products.
#pragma once

#include "pairs.inl"
#include "tiles_amx.h"

namespace {

template <int M, int N>
void multiply_corner(const mh::TileProduct& p, int64_t i, int64_t q) {
  const uint16_t *left = p.left + i * p.depth * kTileNumbers, *right = p.right + q * p.depth * kTileNumbers;
  const int64_t next = p.depth * kTileNumbers, bytes = p.row * 4;
  float* c = p.c + i * 16 * p.row + q * p.block;
  float *below = c + 16 * p.row, *beside = c + p.block, *across = below + p.block;
  if (p.first) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(c, bytes);
    if constexpr (N == 2) tile_load<1>(beside, bytes);
    if constexpr (M == 2) tile_load<2>(below, bytes);
    if constexpr (M == 2 && N == 2) tile_load<3>(across, bytes);
  }
  for (int64_t k = 0; k < p.depth; k++, left += kTileNumbers, right += kTileNumbers) {
    tile_load<4>(left, 64), tile_load<6>(right, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (N == 2) tile_load<7>(right + next, 64), tile_multiply<1, 4, 7>();
    if constexpr (M == 2) tile_load<5>(left + next, 64), tile_multiply<2, 5, 6>();
    if constexpr (M == 2 && N == 2) tile_multiply<3, 5, 7>();
  }
  tile_store<0>(c, bytes);
  if constexpr (N == 2) tile_store<1>(beside, bytes);
  if constexpr (M == 2) tile_store<2>(below, bytes);
  if constexpr (M == 2 && N == 2) tile_store<3>(across, bytes);
}

void multiply_tiles(const mh::TileProduct& p) {
  const TileScope scope;
  int64_t i = 0, q;
  for (; i + 2 <= p.rows; i += 2) {
    for (q = 0; q + 2 <= p.blocks; q += 2) multiply_corner<2, 2>(p, i, q);
    if (q < p.blocks) multiply_corner<2, 1>(p, i, q);
  }
  if (i == p.rows) return;
  for (q = 0; q + 2 <= p.blocks; q += 2) multiply_corner<1, 2>(p, i, q);
  if (q < p.blocks) multiply_corner<1, 1>(p, i, q);
}

}  // namespace
