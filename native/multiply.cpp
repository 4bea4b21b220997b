#include "multiply.h"

#include <string.h>

namespace mh {

void Quantized::prepare(int64_t rows, const Matrix& m, Room& values, Room& scales) {
  depth = m.depth;
  group = m.m.format == MH_INT4 ? m.m.group : kQuantGroup;
  groups = depth / group;
  q = reinterpret_cast<int8_t*>(values.floats(divide_up(rows * depth, 4)));
  scale = scales.floats(2 * rows * groups);
  offset = scale + rows * groups;
}

void Quantized::set(int64_t row, const float* x, const Kernels& k) const {
  k.quantize(x, depth, group, q + row * depth, scale + row * groups, offset + row * groups);
}

Row Quantized::view(int64_t row, const float* x) const {
  if (!q) return {x, nullptr, nullptr, nullptr};
  return {x, q + row * depth, scale + row * groups, offset + row * groups};
}

void dot_few(const Kernels& k, const Panel& p, const Row* rows, int64_t count, float* c) {
  for (int64_t i = 0; i < count; i += kDotRows) {
    const int64_t n = count - i < kDotRows ? count - i : kDotRows;
    k.dot(p, rows + i, static_cast<int>(n), c + 16 * i);
  }
}

int64_t worker_floats(int64_t rows, int64_t depth, const Kernels& k) {
  const int64_t padded = round_up(rows, 16);
  return 32 * padded + kScratch + (k.rounds_rows ? divide_up(padded * (depth + kRoundedPad), 2) : 0);
}

Worker::Worker(Room& room, int64_t rows) {
  const int64_t padded = round_up(rows, 16);
  first = room.floats(0);
  second = first + 16 * padded;
  scratch = second + 16 * padded;
  rounded = reinterpret_cast<uint16_t*>(scratch + kScratch);
}

Rows matrix_rows(const float* const* at, int64_t count, int64_t depth, int64_t format, const Kernels& k,
                 uint16_t* rounded) {
  if (!k.rounds_rows || format == MH_FLOAT32 || format == MH_PLAIN_FLOAT32) return {at, count, nullptr, 0};
  const int64_t stride = depth + kRoundedPad;
  for (int64_t i = 0; i < count; i++) {
    k.narrow(at[i], depth, rounded + i * stride);
    memset(rounded + i * stride + depth, 0, kRoundedPad * sizeof(uint16_t));
  }
  memset(rounded + count * stride, 0, (round_up(count, 16) - count) * stride * sizeof(uint16_t));
  return {at, count, rounded, stride};
}

}  // namespace mh
