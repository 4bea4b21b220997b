// Rows rounded to int8 times a panel of integer weights, for any number of rows. Of each group of inputs
//   d = Σ q·w, exact in int32; then, groups ascending,
//   int8: sum = fma(d, scale of the row, sum), at the end sum · scale of the output
//   int4, q8_0, q4_0: sum = fma(d · scale of the row, scale of the output, sum)
// so that a row's numbers depend on that row and the weights alone: not on the rows beside it, nor on the level.
#pragma once

#include "prefetch.inl"

namespace {

using mh::IntRows;
using mh::kFormats;

// Lines of weights to fetch while four others are multiplied: those that follow, for the first rows; then, for the
// other rows, a share of the next panel.
struct Ahead {
  const uint8_t* at;
  int64_t lines;
  bool soon;  // to the first cache, else to the second
  void fetch() {
    if (soon)
      for (int64_t i = 0; i < lines; i++, at += 64) prefetch(at);
    else
      for (int64_t i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// `begin`: the rows' integers for the inputs at k of a tile.
inline const int8_t* int_inputs(const int8_t* begin, const IntRows& rows, int64_t k) {
  return begin + k / 64 * 64 * rows.tile + k % 64;
}

// M rows from `row` on, all of one tile. `q` are those of the first.
template <int M>
void int8_rows(const Panel& p, const IntRows& rows, int64_t row, const int8_t* q, float* c, Ahead ahead) {
  V sums[M];
  times<M>([&](auto i) { sums[i.value] = set1(0); });
  const uint8_t* line = p.data;
  const int32_t* start = rows.start + row;
  const float* scale = rows.scale + row;
  for (int64_t k = 0; k < p.depth; start += rows.stride, scale += rows.stride) {
    I dots[M];
    times<M>([&](auto i) { dots[i.value] = set1_int(start[i.value]); });
    for (const int64_t end = least(k + rows.group, p.depth); k < end; k += 16, line += 256) {
      const int8_t* x = int_inputs(q, rows, k);
      ahead.fetch();
      times<4>([&](auto l) {
        const Quads w = load_int8(line + 64 * l.value);
        times<M>([&](auto i) { dots[i.value] = dot_int8(dots[i.value], w, x + 64 * i.value + 4 * l.value); });
      });
    }
    times<M>([&](auto i) { sums[i.value] = fma(to_float(dots[i.value]), set1(scale[i.value]), sums[i.value]); });
  }
  const V of_output = load(reinterpret_cast<const float*>(p.scales));
  times<M>([&](auto i) { store(c + 16 * i.value, mul(sums[i.value], of_output)); });
}

// Nibbles or bytes whose groups have scales.
template <int M, int kFormat>
void grouped_rows(const Panel& p, const IntRows& rows, int64_t row, const int8_t* q, float* c, Ahead ahead) {
  V sums[M];
  times<M>([&](auto i) { sums[i.value] = set1(0); });
  const uint8_t* line = p.data;
  const uint16_t* of_outputs = reinterpret_cast<const uint16_t*>(p.scales);
  const int32_t* start = rows.start + row;
  const float* scale = rows.scale + row;
  for (int64_t k = 0; k < p.depth; start += rows.stride, scale += rows.stride, of_outputs += 16) {
    I dots[M];
    times<M>([&](auto i) { dots[i.value] = set1_int(start[i.value]); });
    const int64_t end = k + p.group;
    for (; kFormats[kFormat].bits == 8 && k < end; k += 16, line += 256) {
      const int8_t* x = int_inputs(q, rows, k);
      ahead.fetch();
      times<4>([&](auto l) {
        const Quads w = load_int8(line + 64 * l.value);
        times<M>([&](auto i) { dots[i.value] = dot_int8(dots[i.value], w, x + 64 * i.value + 4 * l.value); });
      });
    }
    for (; k < end; k += 32, line += 256) {
      const int8_t* x = int_inputs(q, rows, k);
      ahead.fetch();
      Part parts[M];
      times<M>([&](auto i) { parts[i.value] = first_part(dots[i.value]); });
      times<4>([&](auto l) {
        Quads first, second;
        load_int4(line + 64 * l.value, first, second);
        times<M>([&](auto i) {
          const int8_t* at = x + 64 * i.value + 8 * l.value;
          parts[i.value] = dot_int4(dot_int4(parts[i.value], first, at), second, at + 4);
        });
      });
      times<M>([&](auto i) { dots[i.value] = with_part(dots[i.value], parts[i.value]); });
    }
    const V of_output = load_scale<kFormat>(of_outputs);
    times<M>([&](auto i) {
      sums[i.value] = fma(mul(to_float(dots[i.value]), set1(scale[i.value])), of_output, sums[i.value]);
    });
  }
  times<M>([&](auto i) { store(c + 16 * i.value, sums[i.value]); });
}

template <int M>
void int_rows_of(int64_t m, const Panel& p, const IntRows& rows, int64_t row, const int8_t* q, float* c,
                 const Ahead& ahead) {
  if (m == M) {
    switch (p.format) {
      case MH_INT8:
        return int8_rows<M>(p, rows, row, q, c, ahead);
      case MH_Q8_0:
        return grouped_rows<M, MH_Q8_0>(p, rows, row, q, c, ahead);
      case MH_Q4_0:
        return grouped_rows<M, MH_Q4_0>(p, rows, row, q, c, ahead);
      default:
        return grouped_rows<M, MH_INT4>(p, rows, row, q, c, ahead);
    }
  }
  if constexpr (M > 1) int_rows_of<M - 1>(m, p, rows, row, q, c, ahead);
}

// c [count][16] = rows times a panel.
void multiply_integers(const Panel& p, const IntRows& rows, float*, float* c) {
  prefetch(p.scales);  // they lie elsewhere
  const int64_t lines = p.depth * kFormats[p.format].bits / 32, more = (rows.count - 1) / rows.tile;
  Ahead ahead{p.data + kPrefetchBytes, 4, true};
  for (int64_t row = 0; row < rows.count; row += rows.tile) {
    const int64_t m = least(rows.tile, rows.count - row);
    int_rows_of<kIntRows>(m, p, rows, row, rows.q + row * p.depth, c + 16 * row, ahead);
    if (row > 0)
      ahead.at += ahead.lines * lines / 4 * 64;
    else
      ahead = p.next && more ? Ahead{p.next->data, (3 + more) / more, false} : Ahead{p.data, 0, false};
  }
}

// How many rows lie together in a tile: as many as a product takes at a time, or fewer so that tiles are alike.
int64_t integer_tile(int64_t count, int64_t) {
  const int64_t tiles = (count + kIntRows - 1) / kIntRows;
  return (count + tiles - 1) / tiles;
}

}  // namespace
