// A block's rows on their way through an expert: tokens as up takes them, activations as down does.
#include <string.h>

#include "forward.h"

namespace mh {

void Forward::lay(const Block& b, uint16_t* tiles) const {
  const uint16_t* rows[kBlockRows];
  for (int64_t i = 0; i < b.rows(); i++) rows[i] = half_x.row(s.token[b.begin + i]);
  k.lay_rows(rows, b.rows(), e.up.size.depth, e.up.format().plain, tiles);
}

uint16_t* Forward::laid_of(const Block& b, const Block* group) const {
  return laid + (b.begin - group->begin + 16 * (&b - group)) * e.up.size.depth;
}

RowBlock Forward::up_rows(const Block& b, const Block* group, const Worker& w) const {
  RowBlock in(b.rows(), e.up, k, exact);
  const float* const* at = in.is_tiles ? nullptr : x_rows.data() + b.begin;
  if (in.is_integer) {
    const IntBlock block(qx.shape, in.count, k.integer_tile(in.count, e.up.m.format), w.rounded);
    for (int64_t i = 0; i < in.count; i++) block.copy(i, qx.row(s.token[b.begin + i]));
    block.clear_rest();
    in.integers = block.rows();
  } else if (in.is_tiles) {
    if (!laid) lay(b, w.rounded);
    in.tiles = {laid ? laid_of(b, group) : w.rounded, in.count};
  } else if (in.is_few) {
    for (int64_t i = 0; i < in.count; i++) in.row[i] = {at[i]};
  } else {
    float* panels = reinterpret_cast<float*>(w.rounded);
    gather(at, in.count, e.up.size.depth, panels);
    in.matrix = {panels, in.count};
  }
  return in;
}

// Where a block's activations are. A tile of 16 rows takes 8 as floats.
float* Forward::act_of(const Block& b, const Block* group) const {
  return act + (b.begin - group->begin + kActTileRoom * (&b - group)) * act_stride;
}

// A block's rows of integers for down.
IntBlock Forward::act_integers(const Block& b, const Block* group) const {
  return qact.block(&b - group, b.begin - group->begin, b.rows(), k.integer_tile(b.rows(), e.down.m.format));
}

RowBlock Forward::down_rows(const Block& b, const Block* group) const {
  RowBlock in(b.rows(), e.down, k, exact);
  const float* at = act_of(b, group);
  if (in.is_integer)
    in.integers = act_integers(b, group).rows();
  else if (in.is_tiles)
    in.tiles = {reinterpret_cast<const uint16_t*>(at), in.count};
  else if (in.is_few)
    for (int64_t i = 0; i < in.count; i++) in.row[i] = {at + i * act_stride};
  else
    in.matrix = {at, in.count};
  return in;
}

// 16 columns of a block's activations, from gate and up (the same where up is alone). They lie in tiles as down takes
// them, in rows where they are rounded to integers or the vector path takes them, else in panels, [panels][rows][16].
void Forward::activate(const Block& b, const Block* group, int64_t column, float* gate, const float* up) const {
  const int64_t rows = b.rows(), depth = e.down.size.depth;
  float* out = act_of(b, group);
  if (in_tiles(rows, e.down, k, exact)) {
    k.activate(static_cast<int>(e.activation), gate, up, rows, gate, 16);
    k.lay_columns(gate, rows, column, depth, e.down.format().plain, reinterpret_cast<uint16_t*>(out));
    return;
  }
  const bool in_rows = act_in_rows(rows);
  out += column * (in_rows ? 1 : rows);
  k.activate(static_cast<int>(e.activation), gate, up, rows, out, in_rows ? act_stride : 16);
}

// Zeros beyond F: an infinite x times the zero padding of a weight is NaN, which must not spread.
void Forward::pad_act(const Block& b, float* out) const {
  const int64_t rows = b.rows(), wide = e.up.size.panels / e.parts * 16;
  if (in_tiles(rows, e.down, k, exact)) {
    const std::vector<float> zeros(static_cast<size_t>(16 * rows));
    for (int64_t column = wide; column < act_stride; column += 16)
      k.lay_columns(zeros.data(), rows, column, act_stride, e.down.format().plain, reinterpret_cast<uint16_t*>(out));
  } else if (act_in_rows(rows))
    for (int64_t i = 0; i < rows; i++) memset(out + i * act_stride + wide, 0, (act_stride - wide) * sizeof(float));
  else
    memset(out + wide * rows, 0, (act_stride - wide) * rows * sizeof(float));
}

// The tokens in the forms that the blocks' paths want them in.
void Forward::take_rows(const mh_rows& in) {
  bool any_tiles = false, all_tiles = true;
  for (const Block& b : s.blocks) {
    const bool tiles = in_tiles(b.rows(), e.up, k, exact);
    any_tiles = any_tiles || tiles, all_tiles = all_tiles && tiles;
  }
  if (any_tiles) half_x = as_halves(in, e.up.size.depth, room.halves, k, threads);
  if (all_tiles) return;
  x = as_floats(in, e.up.size.depth, room.x, k, threads);
  x_rows.resize(static_cast<size_t>(s.rows()));
  for (int64_t i = 0; i < s.rows(); i++) x_rows[i] = x.row(s.token[i]);
  if (!e.up.format().integer) return;
  qx.prepare({e.up, k}, in.count, room.integers[0]);
  parallel(threads, divide_up(in.count, kQuantRows), [&](int64_t task, int64_t) {
    for (int64_t t = task * kQuantRows; t < in.count && t < (task + 1) * kQuantRows; t++) qx.set(t, x.row(t), k);
  });
}

}  // namespace mh
