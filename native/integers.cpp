#include "integers.h"

#include <string.h>

namespace mh {

IntShape::IntShape(const Matrix& m, const Kernels& k)
    : depth(m.size.depth),
      group(m.row_group()),
      groups(divide_up(depth, group)),
      shift(m.format().bits == 4 ? 8 : k.int8_shift) {}

IntBlock::IntBlock(const IntShape& s, int64_t rows, int64_t rows_per_tile, void* memory)
    : shape(s), count(rows), tile(rows_per_tile), stride(round_up(rows, tile)) {
  q = static_cast<int8_t*>(memory);
  scale = reinterpret_cast<float*>(q + stride * s.depth);
  start = reinterpret_cast<int32_t*>(scale + stride * s.groups);
}

IntRow IntBlock::row(int64_t i) const {
  return {q + i / tile * tile * shape.depth + i % tile * 64, 64 * tile, scale + i, start + i, stride};
}

void IntBlock::set(int64_t i, const float* x, const Kernels& k) const {
  k.quantize(x, shape.depth, shape.group, shape.shift, row(i));
}

void IntBlock::copy(int64_t i, const IntRow& from) const {
  const IntRow to = row(i);
  for (int64_t p = 0; p < shape.depth / 64; p++) memcpy(to.q + p * to.q_step, from.q + p * from.q_step, 64);
  for (int64_t g = 0; g < shape.groups; g++) {
    to.scale[g * to.stride] = from.scale[g * from.stride];
    to.start[g * to.stride] = from.start[g * from.stride];
  }
}

void IntBlock::clear_rest() const {
  for (int64_t i = count; i < stride; i++)
    for (int64_t g = 0; g < shape.groups; g++) scale[g * stride + i] = 0;
}

void IntList::prepare(const IntShape& s, int64_t rows, Workspace& workspace) {
  shape = s;
  q = reinterpret_cast<int8_t*>(workspace.floats(divide_up(rows * round_up(s.row_bytes(), 64), 4)));
}

IntRow IntList::row(int64_t i) const {
  int8_t* at = q + i * round_up(shape.row_bytes(), 64);
  float* scale = reinterpret_cast<float*>(at + shape.depth);
  return {at, 64, scale, reinterpret_cast<int32_t*>(scale + shape.groups), 1};
}

void IntList::set(int64_t i, const float* x, const Kernels& k) const {
  k.quantize(x, shape.depth, shape.group, shape.shift, row(i));
}

void IntBlocks::prepare(const IntShape& s, int64_t rows, int64_t blocks, Workspace& workspace) {
  shape = s;
  const int64_t bytes = (rows + blocks * kTileRoom) * s.row_bytes() + 64 * blocks;
  memory = reinterpret_cast<uint8_t*>(workspace.floats(divide_up(bytes, 4)));
}

IntBlock IntBlocks::block(int64_t index, int64_t begin, int64_t rows, int64_t rows_per_tile) const {
  const int64_t bytes = (begin + index * kTileRoom) * shape.row_bytes() + 64 * index;
  return {shape, rows, rows_per_tile, memory + bytes / 64 * 64};
}

}  // namespace mh
