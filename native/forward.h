// The experts' forward pass: what its phases share (forward.cpp), and a block's rows as the matrices take them
// (forward_rows.cpp).
#pragma once

#include "fetch.h"
#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {

constexpr int64_t kActTileRoom = 8;  // rows of floats by which a block in tiles may take more than its own

struct Forward {
  const Kernels& k;
  Experts e;
  Workspaces& room;
  Arrivals* arrivals;  // brings experts whose record is null, or null: there is none
  int64_t threads;
  bool exact;
  float *hidden, *y = nullptr;
  int64_t y_stride = 0;
  Sorted s = {};
  Floats x = {};
  Halves half_x = {};
  uint16_t* laid = nullptr;  // a group's rows in tiles, where several tasks take a block's
  float* act = nullptr;      // a group's activations
  int64_t act_stride = 0;
  IntList qx = {};      // tokens, where up is of integers
  IntBlocks qact = {};  // a group's activations, where down is
  std::vector<const float*> x_rows = {};

  void all(const mh_rows& in, const mh_rows& out);

 private:
  using Blocks = std::vector<const Block*>;

  // Of these blocks `group` is the first one's place: a group lies together in `act` and `laid`.
  void lay(const Block& b, uint16_t* tiles) const;
  uint16_t* laid_of(const Block& b, const Block* group) const;
  float* act_of(const Block& b, const Block* group) const;
  IntBlock act_integers(const Block& b, const Block* group) const;
  bool act_in_rows(int64_t rows) const { return e.down.format().integer || few(rows, e.down, exact); }
  RowBlock up_rows(const Block& b, const Block* group, const Worker& w) const;
  RowBlock down_rows(const Block& b, const Block* group) const;
  void activate(const Block& b, const Block* group, int64_t column, float* gate, const float* up) const;
  void pad_act(const Block& b, float* out) const;

  void take_rows(const mh_rows& in);
  void up_task(const Block& b, const Block* group, int64_t first, int64_t count, Worker w);
  void up(const Blocks& some, const Block* group, int64_t most);
  void down_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w);
  void group(const Block* blocks, size_t count);
};

}  // namespace mh
