// Rows of activations rounded to int8, as the products with integer weights take them.
#pragma once

#include "matrix.h"

namespace mh {

struct IntShape {  // what rows for a matrix have in common
  int64_t depth = 0, group = 0, groups = 0;
  int32_t shift = 0;

  IntShape() = default;
  IntShape(const Matrix& m, const Kernels& k);
  int64_t row_bytes() const { return depth + groups * 8; }
};

constexpr int64_t kQuantRows = 4;  // rows that a task rounds
constexpr int64_t kTileRoom = 16;  // rows by which a block's last tile may be longer than the block

// Some rows in tiles, in memory for `count + kTileRoom` of them at a multiple of 64 bytes.
struct IntBlock {
  IntShape shape;
  int64_t count, tile, stride;
  int8_t* q;
  float* scale;
  int32_t* start;

  IntBlock(const IntShape& s, int64_t rows, int64_t rows_per_tile, void* memory);
  IntRow row(int64_t i) const;
  IntRows rows() const { return {q, scale, start, count, tile, stride, shape.group}; }
  void set(int64_t i, const float* x, const Kernels& k) const;
  void copy(int64_t i, const IntRow& from) const;
  void clear_rest() const;  // scales of rows that the last tile lacks: a level may multiply them all the same
};

// Rows by themselves, each written once and copied to the blocks that need it.
struct IntList {
  IntShape shape;
  int8_t* q = nullptr;

  void prepare(const IntShape& s, int64_t rows, Workspace& workspace);
  IntRow row(int64_t i) const;
  void set(int64_t i, const float* x, const Kernels& k) const;
};

// Blocks of rows that lie one after the other: block `index` begins with row `begin`.
struct IntBlocks {
  IntShape shape;
  uint8_t* memory = nullptr;

  void prepare(const IntShape& s, int64_t rows, int64_t blocks, Workspace& workspace);
  IntBlock block(int64_t index, int64_t begin, int64_t rows, int64_t rows_per_tile) const;
};

}  // namespace mh
