// Rows times one panel, by whichever path suits their number.
#pragma once

#include "integers.h"
#include "sorted.h"

namespace mh {

// Whether rows take the vector path, in which each is by itself: where they are few, and exactly where all must.
inline bool few(int64_t rows, const Matrix& m, bool exact) {
  return rows <= m.format().few_rows || (exact && !m.format().integer);
}

// Whether rows are rounded to bf16 and lie in tiles: where the level and the weights have bf16, and rows are not few.
inline bool in_tiles(int64_t rows, const Matrix& m, const Kernels& k, bool exact) {
  return k.rounds_rows && !m.format().exact && !few(rows, m, exact);
}

struct RowBlock {  // rows as a matrix's kernels take them: as integers, in tiles of bf16, each by itself where they are
  int64_t count;   // few, or else as a matrix
  bool is_integer, is_few, is_tiles;
  Row row[kBlockRows];
  Rows matrix;
  TileRows tiles;
  IntRows integers;
  RowBlock(int64_t rows, const Matrix& m, const Kernels& k, bool exact)
      : count(rows),
        is_integer(m.format().integer),
        is_few(few(rows, m, exact)),
        is_tiles(in_tiles(rows, m, k, exact)),
        matrix{},
        tiles{},
        integers{} {}
  // Some panels; c [count][16] for each, c_stride apart.
  void times(const Kernels& k, const Panel* p, int64_t panels, float* scratch, float* c, int64_t c_stride) const;
};

// Rows in bf16 for tiles, zeros up to `depth` inputs: the caller's, or a copy in `workspace`.
struct Halves {
  const uint16_t* data;
  int64_t stride;
  const uint16_t* row(int64_t i) const { return data + i * stride; }
};
Halves as_halves(const mh_rows& rows, int64_t depth, Workspace& workspace, const Kernels& k, int64_t threads);

// Floats that a worker needs apart from its task's rows: tiles, a product's scratch, rows in tiles or panels.
int64_t worker_floats(int64_t rows, int64_t depth);

struct Worker {
  float *first, *second, *scratch;  // [kColumnBlocks][c_stride]; [c_stride]; kScratch
  int64_t c_stride;                 // floats of 16 columns of the rows, padded
  uint16_t* rounded;                // the task's rows: tiles, or floats in panels
  Worker(Workspace& workspace, int64_t rows);
};

// Rows to panels.
void gather(const float* const* at, int64_t count, int64_t depth, float* to);

}  // namespace mh
