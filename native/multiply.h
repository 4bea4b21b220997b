// Rows times one panel, by whichever path suits their number.
#pragma once

#include "integers.h"
#include "sorted.h"

namespace mh {

constexpr int64_t kRoundedPad = 32;  // rows a power of two apart would all fall into one set of the cache

// Whether rows take the vector path, in which each is by itself: where they are few, and exactly where all must.
inline bool few(int64_t rows, const Matrix& m, bool exact) {
  return rows <= m.format().few_rows || (exact && !m.format().integer);
}

struct RowBlock {  // rows as a matrix's kernels take them: as integers, or each by itself where they are few, or else
  int64_t count;  // as a matrix
  bool is_integer, is_few;
  Row row[kBlockRows];
  Rows matrix;
  IntRows integers;
  RowBlock(int64_t rows, const Matrix& m, bool exact)
      : count(rows), is_integer(m.format().integer), is_few(few(rows, m, exact)), matrix{}, integers{} {}
  void times(const Kernels& k, const Panel& p, float* scratch, float* c) const;  // a worker's; c [count][16]
};

// Floats that a worker needs apart from its task's rows: tiles, a product's scratch, rounded rows.
int64_t worker_floats(int64_t rows, int64_t depth, const Kernels& k);

struct Worker {
  float *first, *second, *scratch;  // [kColumnBlocks][c_stride]; [c_stride]; kScratch
  int64_t c_stride;                 // floats of 16 columns of the rows, padded
  uint16_t* rounded;                // a level's rows, or floats in panels
  Worker(Workspace& workspace, int64_t rows);
};

// Rows that lie anywhere as a level wants them for its matrix path.
Rows matrix_rows(const float* const* at, int64_t count, int64_t depth, int64_t format, const Kernels& k,
                 uint16_t* scratch);
// The same of rows in panels, [depth / 16][count][16].
Rows panel_rows(const float* at, int64_t count, int64_t depth, int64_t format, const Kernels& k, uint16_t* scratch);
// Rows to panels.
void gather(const float* const* at, int64_t count, int64_t depth, float* to);

}  // namespace mh
