#include "multiply.h"

#include <string.h>

#include "pool.h"

namespace mh {

void RowBlock::times(const Kernels& k, const Panel* p, int64_t panels, float* scratch, float* c,
                     int64_t c_stride) const {
  if (is_tiles) return k.product_tiles(p, panels, tiles, scratch, c, c_stride);
  for (int64_t q = 0; q < panels; q++, c += c_stride) {
    if (is_integer) {
      k.multiply_integers(p[q], integers, scratch, c);
      continue;
    }
    if (!is_few) {
      k.product(p[q], matrix, scratch, c);
      continue;
    }
    const Format& f = kFormats[p[q].format];
    if (f.plain && (count > kDotRows || !f.few_rows)) {
      const float* at[kBlockRows];
      for (int64_t i = 0; i < count; i++) at[i] = row[i].x;
      k.gemm_plain(p[q], at, count, scratch, c);  // the same bits
      continue;
    }
    for (int64_t i = 0; i < count; i += kDotRows) {
      const int64_t n = count - i < kDotRows ? count - i : kDotRows;
      k.dot(p[q], row + i, static_cast<int>(n), c + 16 * i);
    }
  }
}

Halves as_halves(const mh_rows& rows, int64_t depth, Workspace& workspace, const Kernels& k, int64_t threads) {
  if (rows.dtype == MH_BF16 && rows.width >= depth) return {static_cast<const uint16_t*>(rows.data), rows.stride};
  uint16_t* to = reinterpret_cast<uint16_t*>(workspace.floats(divide_up(rows.count * depth, 2)));
  constexpr int64_t block = 64;
  parallel(threads, divide_up(rows.count, block), [&](int64_t task, int64_t) {
    for (int64_t i = task * block; i < rows.count && i < (task + 1) * block; i++) {
      uint16_t* row = to + i * depth;
      if (rows.dtype == MH_BF16)
        memcpy(row, static_cast<const uint16_t*>(rows.data) + i * rows.stride, rows.width * sizeof(uint16_t));
      else
        k.narrow(static_cast<const float*>(rows.data) + i * rows.stride, rows.width, row);
      memset(row + rows.width, 0, (depth - rows.width) * sizeof(uint16_t));
    }
  });
  return {to, depth};
}

int64_t worker_floats(int64_t rows, int64_t depth) {
  const int64_t padded = round_up(rows, 16), tiles = (kColumnBlocks + 1) * 16 * padded + kScratch;
  return tiles + padded * round_up(depth, 16);
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

}  // namespace mh
