// Integer products in AMX tiles: 16 rows, 16 outputs and 64 inputs, or 32 where a scale covers no more. A group's int32
// sums are stored, and the floats of integers.inl's arithmetic follow in the vector unit while the next groups are
// multiplied. The bits are those of the vector path, which takes the rows that would not fill a tile.
#pragma once

#include "integers.inl"
#include "tiles_amx.h"

namespace {

constexpr int64_t kTileRowsAmx = 16;
constexpr int64_t kFewBytes = 8, kFewNibbles = 12;  // up to so many rows the vector path is as fast
constexpr int64_t kInputs = 1024;               // of a panel at a time: 16 KiB, which stay in the first cache
constexpr int kWholeRows = 4, kWholeWeights = 5, kHalfRows = 6, kHalfWeights = 7;  // tiles 0 to 3 are sums
// The sums of four groups lie beside each other. A load waits for an earlier store to an address 4096 bytes away as if
// it were the same, so that more than four took twice the time.
constexpr int64_t kInts = 4 * 256;

struct TileRun {  // the rows of one tile by some inputs of a panel
  const int8_t* q;             // [inputs / 64][16][64]
  const uint8_t* lines;        // [inputs / 4][16][4], with signs
  const float* scale;          // of the rows, [groups][stride]
  const uint16_t* of_outputs;  // where groups have them: [groups][16]
  int64_t stride, group, groups;
  int32_t* ints;  // [4][16][16]
};

// Group g, if there is one, to tile T: whole tiles of 64 inputs, or half a one.
template <int T>
inline void group_sums(const TileRun& run, int64_t g) {
  if (g >= run.groups) return;
  tile_zero<T>();
  const int64_t k = g * run.group;
  if (run.group == 32) {
    tile_load<kHalfRows>(run.q + k / 64 * 1024 + k % 64, 64);
    tile_load<kHalfWeights>(run.lines + 16 * k, 64);
    tile_multiply_int8<T, kHalfRows, kHalfWeights>();
  } else {
    for (int64_t i = k; i < k + run.group; i += 64) {
      tile_load<kWholeRows>(run.q + 16 * i, 64);
      tile_load<kWholeWeights>(run.lines + 16 * i, 64);
      tile_multiply_int8<T, kWholeRows, kWholeWeights>();
    }
  }
}

// And, when it is done, to its place among `ints`: a store that waits for its tile holds up what comes after it.
template <int T>
inline void group_store(const TileRun& run, int64_t g) {
  if (g < run.groups) tile_store<T>(run.ints + 256 * T, 64);
}

// c [M][16] = or += the run's products, group by group, four groups behind the tiles.
template <int M, int kFormat>
void run_tiles(const TileRun& run, float* c, bool first, Ahead& ahead) {
  V sums[M];
  times<M>([&](auto i) { sums[i.value] = first ? set1(0) : load(c + 16 * i.value); });
  const auto add_group = [&](int64_t g, const int32_t* d) {
    if (g >= run.groups) return;
    const float* scale = run.scale + g * run.stride;
    ahead.fetch();
    V of_output = set1(0);
    if constexpr (kFormats[kFormat].grouped) of_output = load_scale<kFormat>(run.of_outputs + 16 * g);
    times<M>([&](auto i) {
      const V x = to_float(load_ints(d + 16 * i.value)), of_row = set1(scale[i.value]);
      sums[i.value] =
          kFormats[kFormat].grouped ? fma(mul(x, of_row), of_output, sums[i.value]) : fma(x, of_row, sums[i.value]);
    });
  };
  group_sums<0>(run, 0);
  group_sums<1>(run, 1);
  group_sums<2>(run, 2), group_store<0>(run, 0);
  group_sums<3>(run, 3), group_store<1>(run, 1);
  for (int64_t g = 0; g < run.groups; g += 4) {
    group_sums<0>(run, g + 4), group_store<2>(run, g + 2), add_group(g, run.ints);
    group_sums<1>(run, g + 5), group_store<3>(run, g + 3), add_group(g + 1, run.ints + 256);
    group_sums<2>(run, g + 6), group_store<0>(run, g + 4), add_group(g + 2, run.ints + 512);
    group_sums<3>(run, g + 7), group_store<1>(run, g + 5), add_group(g + 3, run.ints + 768);
  }
  times<M>([&](auto i) { store(c + 16 * i.value, sums[i.value]); });
}

template <int kFormat>
void multiply_tiles(const Panel& p, const IntRows& rows, float* scratch, float* c) {
  constexpr bool nibbles = kFormats[kFormat].bits == 4;
  const TileScope scope(kHalfRows, kHalfWeights);
  int32_t* ints = reinterpret_cast<int32_t*>(scratch);
  uint8_t* unpacked = reinterpret_cast<uint8_t*>(ints + kInts);
  const int64_t tiles = (rows.count + kTileRowsAmx - 1) / kTileRowsAmx;
  const int64_t lines = rows.group / (nibbles ? 8 : 4);  // of a group
  Ahead ahead{p.next ? p.next->data : p.data, p.next ? (lines + tiles - 1) / tiles : 0, false};
  for (int64_t k = 0; k < p.depth; k += kInputs) {
    const int64_t n = least(kInputs, p.depth - k), g = k / rows.group;
    for (int64_t i = 0; nibbles && i < n; i += 8) unpack_int4(p.data + 8 * (k + i), unpacked + 16 * i);
    for (int64_t row = 0; row < rows.count; row += kTileRowsAmx) {
      const TileRun run{.q = rows.q + row * p.depth + 16 * k,
                        .lines = nibbles ? unpacked : p.data + 16 * k,
                        .scale = rows.scale + g * rows.stride + row,
                        .of_outputs = reinterpret_cast<const uint16_t*>(p.scales) + 16 * g,
                        .stride = rows.stride,
                        .group = rows.group,
                        .groups = n / rows.group,
                        .ints = ints};
      const auto product = rows.count - row > 8 ? run_tiles<16, kFormat> : run_tiles<8, kFormat>;
      product(run, c + 16 * row, k == 0, ahead);
    }
  }
  if (kFormats[kFormat].grouped) return;
  const V of_output = load(reinterpret_cast<const float*>(p.scales));
  for (int64_t i = 0; i < rows.count; i++) store(c + 16 * i, mul(load(c + 16 * i), of_output));
}

void multiply_integers_amx(const Panel& p, const IntRows& rows, float* scratch, float* c) {
  if (rows.tile != kTileRowsAmx) return multiply_integers(p, rows, scratch, c);
  switch (p.format) {
    case MH_INT8:
      return multiply_tiles<MH_INT8>(p, rows, scratch, c);
    case MH_Q8_0:
      return multiply_tiles<MH_Q8_0>(p, rows, scratch, c);
    case MH_Q4_0:
      return multiply_tiles<MH_Q4_0>(p, rows, scratch, c);
    default:
      return multiply_tiles<MH_INT4>(p, rows, scratch, c);
  }
}

int64_t integer_tile_amx(int64_t count, int64_t format) {
  const int64_t few = least(kFormats[format].bits == 8 ? kFewBytes : kFewNibbles, kIntRows);  // fewer where tiles are emulated
  return count <= few ? count : kTileRowsAmx;
}

}  // namespace
