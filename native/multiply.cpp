#include "multiply.h"

#include <string.h>

namespace mh {

void RowBlock::times(const Kernels& k, const Panel& p, float* scratch, float* c) const {
  if (is_integer) return k.multiply_integers(p, integers, scratch, c);
  if (!is_few) return k.product(p, matrix, scratch, c);
  const Format& f = kFormats[p.format];
  if (f.plain && (count > kDotRows || !f.few_rows)) {
    const float* at[kBlockRows];
    for (int64_t i = 0; i < count; i++) at[i] = row[i].x;
    return k.gemm_plain(p, at, count, scratch, c);  // the same bits
  }
  for (int64_t i = 0; i < count; i += kDotRows) {
    const int64_t n = count - i < kDotRows ? count - i : kDotRows;
    k.dot(p, row + i, static_cast<int>(n), c + 16 * i);
  }
}

int64_t worker_floats(int64_t rows, int64_t depth, const Kernels& k) {
  const int64_t padded = round_up(rows, 16), tiles = (kColumnBlocks + 1) * 16 * padded + kScratch;
  return tiles + padded * (round_up(depth, 16) + (k.rounds_rows ? kRoundedPad : 0));
}

Worker::Worker(Workspace& workspace, int64_t rows) {
  c_stride = 16 * round_up(rows, 16);
  first = workspace.floats(0);
  second = first + kColumnBlocks * c_stride;
  scratch = second + c_stride;
  rounded = reinterpret_cast<uint16_t*>(scratch + kScratch);
}

void gather(const float* const* at, int64_t count, int64_t depth, float* to) {
  for (int64_t i = 0; i < count; i++) {
    const float* next = at[i + 2 < count ? i + 2 : count - 1];
    for (int64_t q = 0; q < depth; q += 16) {
      __builtin_prefetch(next + q);
      memcpy(to + q * count + 16 * i, at[i] + q, 64);
    }
  }
}

static bool wants_rounded(int64_t format, const Kernels& k) { return k.rounds_rows && !kFormats[format].exact; }

static Rows rounded_rows(int64_t count, int64_t depth, uint16_t* scratch) {  // with zeros where tiles read too far
  const int64_t stride = depth + kRoundedPad;
  for (int64_t i = 0; i < count; i++) memset(scratch + i * stride + depth, 0, kRoundedPad * sizeof(uint16_t));
  memset(scratch + count * stride, 0, (round_up(count, 16) - count) * stride * sizeof(uint16_t));
  return {nullptr, count, scratch, stride};
}

Rows panel_rows(const float* at, int64_t count, int64_t depth, int64_t format, const Kernels& k, uint16_t* scratch) {
  if (!wants_rounded(format, k)) return {at, count, nullptr, 0};
  const Rows rows = rounded_rows(count, depth, scratch);
  for (int64_t q = 0; q < depth; q += 16)
    for (int64_t i = 0; i < count; i++) k.narrow(at + (q * count + 16 * i), 16, scratch + i * rows.rounded_stride + q);
  return rows;
}

Rows matrix_rows(const float* const* at, int64_t count, int64_t depth, int64_t format, const Kernels& k,
                 uint16_t* scratch) {
  if (!wants_rounded(format, k)) {
    float* to = reinterpret_cast<float*>(scratch);
    gather(at, count, depth, to);
    return {to, count, nullptr, 0};
  }
  const Rows rows = rounded_rows(count, depth, scratch);
  for (int64_t i = 0; i < count; i++) k.narrow(at[i], depth, scratch + i * rows.rounded_stride);
  return rows;
}

}  // namespace mh
