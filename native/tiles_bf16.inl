// What the levels that multiply bf16 add to AVX-512's table: the forward products (product_bf16.inl) and the tiles of
// the backward pass (pairs.inl).
#pragma once

#include "kernels.inl"
#include "pairs.inl"
#include "product_bf16.inl"

namespace {

constexpr mh::Kernels bf16_kernels(const char* name) {
  mh::Kernels k = level_kernels(name);
  k.rounds_rows = true;
  k.product_tiles = product_tiles;
  k.lay_rows = lay_rows;
  k.lay_columns = lay_columns;
  k.tiles = &kTileKernels;
  return k;
}

}  // namespace
