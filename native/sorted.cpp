#include "sorted.h"

namespace mh {

namespace {

// How many pairs there are, kept or not.
int64_t checked_pairs(const mh_routing* routing) {
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
  return all;
}

int64_t checked_id(const mh_routing* routing, int64_t pair, int64_t num_experts) {
  const int64_t e = routing->ids[pair];
  if (e < 0 || e >= num_experts)
    fail(MH_BAD_ROUTING, "a token is routed to expert %lld of %lld, which are numbered from 0", (long long)e,
         (long long)num_experts);
  return e;
}

}  // namespace

std::vector<int64_t> wanted_experts(const mh_routing* routing, int64_t num_experts) {
  const int64_t all = checked_pairs(routing);
  if (num_experts < 1 || num_experts > 1 << 24)
    fail(MH_BAD_ARGUMENT, "%lld experts to fetch from", (long long)num_experts);
  std::vector<char> wanted(static_cast<size_t>(num_experts), 0);
  for (int64_t i = 0; i < all; i++)
    if (routing->kept[i]) wanted[checked_id(routing, i, num_experts)] = 1;
  std::vector<int64_t> experts;
  for (int64_t e = 0; e < num_experts; e++)
    if (wanted[e]) experts.push_back(e);
  return experts;
}

Sorted sort_pairs(const mh_routing* routing, int64_t num_experts) {
  const int64_t all = checked_pairs(routing);
  std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1, 0);
  for (int64_t i = 0; i < all; i++) {
    if (routing->kept[i]) next[checked_id(routing, i, num_experts) + 1]++;
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

bool check_records(const Sorted& s, const Experts& e, bool may_come) {
  if (!e.up.table) return true;
  bool all = true;
  for (const Block& b : s.blocks) {
    const void* record = e.up.table[b.expert];
    all = all && record;
    if (!record && !may_come)
      fail(MH_NOT_RESIDENT, "a token is routed to expert %lld, which is not in memory: its record is null in the table",
           (long long)b.expert);
    if (!is_aligned(record))
      fail(MH_BAD_ARGUMENT, "the record of expert %lld is not aligned to 64 bytes", (long long)b.expert);
  }
  return all;
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
