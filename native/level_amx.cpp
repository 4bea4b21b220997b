// AMX: the matrix path in tiles of 16 rows, 16 outputs and 32 inputs, all bf16 with float32 sums; the rest is
// AVX-512's. Rows and, where the format is an integer one, weights are rounded to bf16 here: the other levels do not.
// Ran against an emulation of the tiles and under an emulator of the machine; never on a CPU that has them.
#if defined(MH_EMULATE)
#include "vector_portable.h"
namespace {
inline void store_pairs(uint8_t* line, V first, V second) {
  uint16_t a[16], b[16];
  store_bf16(a, first), store_bf16(b, second);
  for (int i = 0; i < 16; i++) memcpy(line + 4 * i, a + i, 2), memcpy(line + 4 * i + 2, b + i, 2);
}
}  // namespace
#else
#include "vector_avx512.h"
#endif

#include "kernels.inl"
#include "tiles_amx.h"

namespace {

constexpr int kMostTiles = 6;  // of rows at a time: with one of weights and one of rows, all eight
constexpr int kRowTile = 6, kWeightTile = 7;

template <int N, class F>
inline void each(F&& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f.template operator()<N - 1>();
  }
}

struct Zero {
  template <int T>
  void operator()() const {
    tile_zero<T>();
  }
};
struct Load {
  const float* c;
  template <int T>
  void operator()() const {
    tile_load<T>(c + 256 * T, 64);
  }
};
struct Store {
  float* c;
  template <int T>
  void operator()() const {
    tile_store<T>(c + 256 * T, 64);
  }
};
struct Multiply {
  const uint16_t* rows;
  int64_t stride;
  template <int T>
  void operator()() const {
    tile_load<kRowTile>(rows + 16 * T * stride, 2 * stride);
    tile_multiply<T, kRowTile, kWeightTile>();
  }
};

// N tiles of rows by one panel; `lines` are the panel's bf16 pairs for inputs [k, k + n), n a multiple of 32.
template <int N>
void row_tiles(const Rows& rows, int64_t first_row, int64_t k, int64_t n, const uint8_t* lines, float* c, bool first) {
  first ? each<N>(Zero{}) : each<N>(Load{c});
  const uint16_t* at = rows.rounded + first_row * rows.rounded_stride + k;
  for (int64_t i = 0; i < n; i += 32, lines += 1024) {
    tile_load<kWeightTile>(lines, 64);
    each<N>(Multiply{at + i, rows.rounded_stride});
  }
  each<N>(Store{c});
}

void panel_tiles(const Rows& rows, int64_t k, int64_t n, const uint8_t* lines, float* c, bool first) {
  const int64_t all = (rows.count + 15) / 16;
  for (int64_t t = 0; t < all; t += kMostTiles) {
    float* to = c + 256 * t;
    switch (least(kMostTiles, all - t)) {
      case 1: row_tiles<1>(rows, 16 * t, k, n, lines, to, first); break;
      case 2: row_tiles<2>(rows, 16 * t, k, n, lines, to, first); break;
      case 3: row_tiles<3>(rows, 16 * t, k, n, lines, to, first); break;
      case 4: row_tiles<4>(rows, 16 * t, k, n, lines, to, first); break;
      case 5: row_tiles<5>(rows, 16 * t, k, n, lines, to, first); break;
      default: row_tiles<6>(rows, 16 * t, k, n, lines, to, first);
    }
  }
}

void pair_up(const float* wide, int64_t n, uint8_t* lines) {  // [n][16] float32 -> [n/2][16][2] bf16
  for (int64_t i = 0; i < n; i += 2, lines += 64) store_pairs(lines, load(wide + 16 * i), load(wide + 16 * i + 16));
}

void product_amx(const Panel& p, const Rows& rows, float* scratch, float* c) {
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

void product_transposed_amx(const Columns& w, const Columns& next, const Rows& rows, float* scratch, float* c,
                            int64_t c_stride) {
  if (!rows.rounded) return product_transposed(w, next, rows, scratch, c, c_stride);
  const TileScope scope;
  float *wide = scratch, *transposed = scratch + 256;
  uint8_t* lines = reinterpret_cast<uint8_t*>(scratch + kChunk * 16);
  constexpr int64_t step = kChunk / 16;
  for (int64_t q = 0; q < w.blocks; q++)
    for (int64_t p = 0; p < w.count; p += step) {
      const int64_t count = least(step, w.count - p), even = (count + 1) / 2 * 2;
      for (int64_t j = 0; j < count; j++) {
        transposed_block(w.panels[p + j], w.block + q, wide, transposed);
        pair_up(transposed, 16, lines + 512 * j);
      }
      if (even > count) memset(lines + 512 * count, 0, 512);
      panel_tiles(rows, p * 16, even * 16, lines, c + q * c_stride, p == 0);
    }
}

constexpr mh::Kernels amx_kernels() {
  mh::Kernels k = level_kernels("amx");
  k.rounds_rows = true;
  k.product = product_amx;
  k.product_transposed = product_transposed_amx;
  return k;
}

}  // namespace

const mh::Kernels mh::kAmx = amx_kernels();
