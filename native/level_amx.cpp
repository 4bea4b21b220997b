// AMX: the matrix path of bf16 weights in tiles of 16 rows, 16 outputs and 32 inputs, and that of integer ones
// (integers_amx.inl); the rest is AVX-512's.
#include "vector_bf16.h"

#include "kernels.inl"
#include "multiply_amx.inl"

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

}  // namespace

#include "integers_amx.inl"

#include "product_bf16.inl"

namespace {

// Sums in tiles 0 to 3; 4 and 5 are left, 6 and 7 right.
template <int M, int N>
void corner(const Corner& p, const Fetch& fetch) {
  if (p.first) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(p.c[0][0], 64);
    if constexpr (N == 2) tile_load<1>(p.c[0][1], 64);
    if constexpr (M == 2) tile_load<2>(p.c[1][0], 64);
    if constexpr (M == 2 && N == 2) tile_load<3>(p.c[1][1], 64);
  }
  const uint8_t *left = p.left.at[0], *below = p.left.at[1], *right = p.right.at[0], *beside = p.right.at[1];
  for (int64_t s = 0; s < p.steps; s++) {
    tile_load<6>(right, p.right.stride), tile_load<4>(left, p.left.stride);
    tile_multiply<0, 4, 6>();
    if constexpr (N == 2) tile_load<7>(beside, p.right.stride), tile_multiply<1, 4, 7>();
    if constexpr (M == 2) tile_load<5>(below, p.left.stride), tile_multiply<2, 5, 6>();
    if constexpr (M == 2 && N == 2) tile_multiply<3, 5, 7>();
    left += p.left.step, below += p.left.step, right += p.right.step, beside += p.right.step;
    fetch();
  }
  tile_store<0>(p.c[0][0], 64);
  if constexpr (N == 2) tile_store<1>(p.c[0][1], 64);
  if constexpr (M == 2) tile_store<2>(p.c[1][0], 64);
  if constexpr (M == 2 && N == 2) tile_store<3>(p.c[1][1], 64);
}

}  // namespace

#include "tiles_bf16.inl"

namespace {

constexpr mh::Kernels amx_kernels() {
  mh::Kernels k = bf16_kernels("amx");
  k.integer_tile = integer_tile_amx;
  k.multiply_integers = multiply_integers_amx;
  return k;
}

}  // namespace

const mh::Kernels mh::kAmx = amx_kernels();
