// The matrix path in bf16, rows and weights, with float32 sums. A level that has an instruction for it defines
// `TileScope`, alive while the instruction is used, and
//   void panel_tiles(const Rows&, int64_t k, int64_t n, const uint8_t* lines, float* c, bool first):
// c [rows][16] = or += inputs [k, k + n) of the rows times a panel's, which lie at `lines` as in a record: [n/2][16][2];
// n is a multiple of 32.
#pragma once

#include "kernels.inl"
#include "pairs.inl"

namespace {

void pair_up(const float* wide, int64_t n, uint8_t* lines) {  // [n][16] float32 -> [n/2][16][2] bf16
  for (int64_t i = 0; i < n; i += 2, lines += 64) store_pairs(lines, load(wide + 16 * i), load(wide + 16 * i + 16));
}

void product_bf16(const Panel& p, const Rows& rows, float* scratch, float* c) {
  if (!rows.rounded) return product(p, rows, scratch, c);
  const TileScope scope;
  if (p.format == MH_BF16) return panel_tiles(rows, 0, p.depth, p.data, c, true);
  uint8_t* lines = reinterpret_cast<uint8_t*>(scratch + kChunk * 16);
  for (int64_t k = 0; k < p.depth; k += kChunk) {
    const int64_t n = least(kChunk, p.depth - k);
    pair_up(widen_panel(p, k, n, scratch), n, lines);
    panel_tiles(rows, k, n, lines, c, k == 0);
  }
}

constexpr mh::Kernels bf16_kernels(const char* name) {
  mh::Kernels k = level_kernels(name);
  k.rounds_rows = true;
  k.product = product_bf16;
  k.tiles = &kTileKernels;
  return k;
}

}  // namespace
