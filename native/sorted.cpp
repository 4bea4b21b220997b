#include "sorted.h"

namespace mh {

Sorted sort_pairs(const mh_routing* routing, int64_t num_experts) {
  need(routing, "routing");
  if (routing->tokens < 0 || routing->per_token < 0)
    fail(MH_BAD_ARGUMENT, "routing of %lld tokens to %lld experts each", (long long)routing->tokens,
         (long long)routing->per_token);
  const int64_t all = routing->tokens * routing->per_token;
  if (all) {
    need(routing->ids, "expert ids");
    need(routing->weights, "weights");
    need(routing->kept, "kept");
  }
  std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1, 0);
  for (int64_t i = 0; i < all; i++) {
    if (!routing->kept[i]) continue;
    const int64_t e = routing->ids[i];
    if (e < 0 || e >= num_experts)
      fail(MH_BAD_ROUTING, "a token is routed to expert %lld of %lld, which are numbered from 0", (long long)e,
           (long long)num_experts);
    next[e + 1]++;
  }
  Sorted s;
  for (int64_t e = 0; e < num_experts; e++) {
    const int64_t begin = next[e], count = next[e + 1];
    const int64_t blocks = divide_up(count, kBlockRows);
    for (int64_t b = 0; b < blocks; b++)
      s.blocks.push_back({e, begin + b * count / blocks, begin + (b + 1) * count / blocks});
    next[e + 1] += begin;
  }
  const size_t rows = static_cast<size_t>(next[num_experts]);
  s.pair.resize(rows), s.token.resize(rows), s.weight.resize(rows);
  for (int64_t t = 0, i = 0; t < routing->tokens; t++)
    for (int64_t k = 0; k < routing->per_token; k++, i++) {
      if (!routing->kept[i]) continue;
      const int64_t row = next[routing->ids[i]]++;
      s.pair[row] = i, s.token[row] = t, s.weight[row] = routing->weights[i];
    }
  return s;
}

void check_hidden(const float* hidden, int64_t count, int64_t wanted) {
  need(hidden, "hidden");
  if (count < wanted) fail(MH_BAD_ARGUMENT, "hidden has %lld numbers, not %lld", (long long)count, (long long)wanted);
}

std::vector<size_t> group_blocks(const std::vector<Block>& blocks, int64_t floats) {
  std::vector<size_t> ends;
  const int64_t limit = kGroupFloats / floats;
  for (size_t first = 0; first < blocks.size();) {
    size_t end = first + 1;
    while (end < blocks.size() && blocks[end].end - blocks[first].begin <= limit) end++;
    ends.push_back(end);
    first = end;
  }
  return ends;
}

}  // namespace mh
