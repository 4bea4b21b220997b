// What the files of a level's kernels share. kernels.inl says where they come together.
#pragma once

#include "format.h"
#include "kernels.h"
#include "manyhands.h"

namespace {

using mh::Columns;
using mh::kChunk;
using mh::Panel;
using mh::Row;
using mh::Rows;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// f(Number<0>), f(Number<1>), ... Of a loop gcc 12 makes the same only sometimes, and else keeps a tile's sums in
// memory.
template <int N>
struct Number {
  static constexpr int value = N;
};
template <int N, class F>
inline __attribute__((always_inline)) void times(const F& f) {
  if constexpr (N > 0) {
    times<N - 1>(f);
    f(Number<N - 1>{});
  }
}

}  // namespace
