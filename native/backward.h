// The experts' backward pass: what its two ways share. A way works on one group of blocks at a time, and gives each
// number to one task, so that the result does not depend on the number of threads.
#pragma once

#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {

struct Backward {
  const Kernels& k;
  Experts e;
  int64_t threads;
  const float* hidden;  // block by block in panels, [panels][rows][16]
  const mh_gradients& g;
  Sorted s = {};
  Floats x = {}, dy = {};
  float* dx = nullptr;
  int64_t act_stride = 0, h_stride = 0, dy_stride = 0, dx_stride = 0;
  std::vector<const float*> x_rows = {}, dy_rows = {};
  std::vector<char> seen = {};  // experts whose weight gradient has been begun

  bool any_weights() const { return g.up || g.down || g.up_bias || g.down_bias; }
  void weight_gradients(const Block&, const float* dweight) const;  // of the router, from <act, dact>
};

// In float32, any format. In tiles of bf16 where the level has them and the format may be rounded.
void backward_floats(Backward&);
void backward_tiles(Backward&);

}  // namespace mh
