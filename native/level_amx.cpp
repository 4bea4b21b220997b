// AMX: the matrix path of bf16 weights in tiles of 16 rows, 16 outputs and 32 inputs, and that of integer ones
// (integers_amx.inl); the rest is AVX-512's.
#include "vector_bf16.h"

#include "kernels.inl"
#include "multiply_amx.inl"

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
