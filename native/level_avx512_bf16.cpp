// AVX-512 with VDPBF16PS, which multiplies two bf16 inputs by sixteen outputs at once; the rest is AVX-512's.
#include "vector_bf16.h"

#include "kernels.inl"
#include "pairs.inl"

namespace {

struct TileScope {
  ~TileScope() {}  // so that it counts as used
};

// c + two inputs of one row, at `x`, times those of sixteen outputs.
inline V dot_pairs(V c, const uint16_t* x, const uint8_t* line) {
#if defined(MH_EMULATE)
  V first, second;
  load_pairs(line, first, second);
  return fma(set1(number(x[0])), first, fma(set1(number(x[1])), second, c));
#else
  uint32_t pair;
  memcpy(&pair, x, 4);
  return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_loadu_si512(line), (__m512bh)_mm512_set1_epi32((int)pair))};
#endif
}

// Eight rows of left tiles, from the given one on, times N blocks of right tiles.
template <int N>
void eight_rows(const mh::TileProduct& p, int64_t row, int64_t block) {
  const uint16_t* left = p.left + row / 16 * p.depth * kTileNumbers + row % 16 * 32;
  const uint8_t* right = reinterpret_cast<const uint8_t*>(p.right + block * p.depth * kTileNumbers);
  const int64_t next = p.depth * 2 * kTileNumbers;
  float* c = p.c + row * p.row + block * p.block;
  V sums[8 * N];
  times<8 * N>(
      [&](auto i) { sums[i.value] = p.first ? set1(0) : load(c + i.value / N * p.row + i.value % N * p.block); });
  for (int64_t k = 0; k < p.depth; k++, left += kTileNumbers)
    for (int64_t j = 0; j < 32; j += 2, right += 64)
      times<8 * N>([&](auto i) {
        sums[i.value] = dot_pairs(sums[i.value], left + i.value / N * 32 + j, right + i.value % N * next);
      });
  times<8 * N>([&](auto i) { store(c + i.value / N * p.row + i.value % N * p.block, sums[i.value]); });
}

void multiply_tiles(const mh::TileProduct& p) {
  for (int64_t row = 0; row < 16 * p.rows; row += 8) {
    int64_t block = 0;
    for (; block + 3 <= p.blocks; block += 3) eight_rows<3>(p, row, block);
    if (p.blocks - block == 2) eight_rows<2>(p, row, block);
    if (p.blocks - block == 1) eight_rows<1>(p, row, block);
  }
}

}  // namespace

#include "product_bf16.inl"

namespace {

// Eight rows of a left tile by N right tiles.
template <int N>
void eight_rows(const Corner& p, const uint8_t* left, float* const* c, int64_t row, const Fetch& fetch) {
  V sums[8 * N];
  times<8 * N>([&](auto i) { sums[i.value] = p.first ? set1(0) : load(c[i.value % N] + 16 * (row + i.value / N)); });
  const uint8_t* right[2] = {p.right.at[0], p.right.at[1]};
  for (int64_t s = 0; s < p.steps; s++, left += p.left.step) {
    if (row == 0) fetch();
    for (int64_t k = 0; k < 16; k++)
      times<8 * N>([&](auto i) {
        const uint8_t* x = left + i.value / N * p.left.stride + 4 * k;
        sums[i.value] = dot_pairs(sums[i.value], reinterpret_cast<const uint16_t*>(x),
                                  right[i.value % N] + s * p.right.step + 64 * k);
      });
  }
  times<8 * N>([&](auto i) { store(c[i.value % N] + 16 * (row + i.value / N), sums[i.value]); });
}

template <int M, int N>
void corner(const Corner& p, const Fetch& fetch) {
  for (int64_t i = 0; i < M; i++)
    for (int64_t row = 0; row < 16 && 16 * i + row < p.rows; row += 8)
      eight_rows<N>(p, p.left.at[i] + row * p.left.stride, p.c[i], row, fetch);
}

}  // namespace

#include "tiles_bf16.inl"

const mh::Kernels mh::kAvx512Bf16 = bf16_kernels("avx512_bf16");
