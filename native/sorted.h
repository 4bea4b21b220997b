// The kept pairs in the order of their experts, and the blocks of rows they are worked on in.
#pragma once

#include <vector>

#include "matrix.h"

namespace mh {

constexpr int64_t kBlockRows = 192;                 // two panels of 192 rows fit the first cache
constexpr int64_t kGroupFloats = int64_t{1} << 21;  // what one group of blocks may write between two phases

struct Block {  // rows [begin, end) of the sorted pairs, all of one expert
  int64_t expert, begin, end;
  int64_t rows() const { return end - begin; }
};

struct Sorted {
  std::vector<int64_t> pair, token;  // of each sorted row; within an expert, tokens in order
  std::vector<float> weight;
  std::vector<Block> blocks;
  int64_t rows() const { return static_cast<int64_t>(pair.size()); }
  // The block after one of `blocks`, or that one itself: whose weights will be wanted next.
  const Block& after(const Block& b) const { return &b == &blocks.back() ? b : *(&b + 1); }
};

// Checks every kept id. Throws MH_BAD_ROUTING.
Sorted sort_pairs(const mh_routing* routing, int64_t num_experts);

// The experts that pairs are kept for, each once, in ascending order.
std::vector<int64_t> wanted_experts(const mh_routing* routing, int64_t num_experts);

// Whether every expert of a block has its record. Throws MH_NOT_RESIDENT where not, unless records `may_come`.
bool check_records(const Sorted& s, const Experts& e, bool may_come);

void check_hidden(const float* hidden, int64_t count, int64_t wanted);

// Ends of groups of consecutive blocks whose rows, `floats` each, together stay within kGroupFloats where they can.
std::vector<size_t> group_blocks(const std::vector<Block>& blocks, int64_t floats);

}  // namespace mh
