// What is checked of caches and sequences before anything is read or written.
#include "cache.h"

namespace mh {
namespace {

constexpr int64_t kMost = int64_t{1} << 48;  // of positions and rows: sums of a few stay far from overflow

// The numbers that `slots` positions of block `block` reach; in double, where nothing overflows.
double reach(double block, double groups, double slots, int64_t width, int64_t b, int64_t g, int64_t r) {
  return block * static_cast<double>(b) + (groups - 1) * static_cast<double>(g) +
         (slots - 1) * static_cast<double>(r) + static_cast<double>(width);
}

void check_block(const mh_cache& c, int64_t sequence, int64_t block, int64_t slots) {
  const double b = static_cast<double>(block), g = static_cast<double>(c.groups), n = static_cast<double>(slots);
  if (block < 0 || reach(b, g, n, c.k_width, c.k_block, c.k_group, c.k_row) > static_cast<double>(c.k_size) ||
      reach(b, g, n, c.v_width, c.v_block, c.v_group, c.v_row) > static_cast<double>(c.v_size))
    fail(MH_BAD_ARGUMENT, "cache: there is no room for %lld positions in block %lld, of sequence %lld",
         (long long)slots, (long long)block, (long long)sequence);
}

}  // namespace

void check_cache(const mh_cache* c) {
  need(c, "the cache");
  need(c->k, "the cache of keys");
  need(c->v, "the cache of values");
  if (c->k_width < 1 || c->v_width < 1 || c->k_width % 16 || c->v_width % 16)
    fail(MH_BAD_ARGUMENT, "cache: keys of %lld and values of %lld numbers are not multiples of 16",
         (long long)c->k_width, (long long)c->v_width);
  if (c->groups < 1 || c->k_row < c->k_width || c->v_row < c->v_width)
    fail(MH_BAD_ARGUMENT, "cache: %lld groups, with %lld and %lld numbers from one position to the next",
         (long long)c->groups, (long long)c->k_row, (long long)c->v_row);
  if (c->block < 1 || c->k_block < 0 || c->v_block < 0 || c->k_group < 0 || c->v_group < 0)
    fail(MH_BAD_ARGUMENT, "cache: blocks of %lld positions, %lld and %lld numbers from one to the next, groups %lld "
         "and %lld", (long long)c->block, (long long)c->k_block, (long long)c->v_block, (long long)c->k_group,
         (long long)c->v_group);
  if (c->dtype != MH_FLOAT32 && c->dtype != MH_BF16)
    fail(MH_BAD_ARGUMENT, "cache: %lld is not the code of float32 or bf16", (long long)c->dtype);
}

int64_t check_sequences(const mh_sequences* s, const mh_cache& c) {
  need(s, "the sequences");
  need(s->begin, "where the sequences begin");
  need(s->first, "the sequences' first positions");
  need(s->table, "the sequences' tables");
  need(s->blocks, "the blocks");
  if (s->count < 1 || s->count > kMost || s->begin[0] != 0)
    fail(MH_BAD_ARGUMENT, "%lld sequences, of which the first has rows from %lld on: at least 1, from 0 on",
         (long long)s->count, (long long)(s->count < 1 || s->count > kMost ? 0 : s->begin[0]));
  for (int64_t i = 0; i < s->count; i++) {
    const int64_t start = start_of(*s, i);
    if (s->begin[i + 1] < s->begin[i] || s->begin[i + 1] > kMost || s->first[i] < 0 || s->first[i] > kMost || start < 0)
      fail(MH_BAD_ARGUMENT, "sequence %lld has rows %lld to %lld, at positions from %lld on, the first real one %lld",
           (long long)i, (long long)s->begin[i], (long long)s->begin[i + 1], (long long)s->first[i], (long long)start);
    const int64_t rows = s->begin[i + 1] - s->begin[i], length = s->first[i] + rows;
    const int64_t from = std::min(start, s->first[i]);  // rows that are padding are written too
    if (!rows) continue;
    const int64_t last = (length - 1) / c.block;
    if (s->table[i] < 0 || s->table[i] > s->entries - 1 - last)
      fail(MH_BAD_ARGUMENT, "sequence %lld: there is no room for %lld positions in a table at %lld of %lld blocks",
           (long long)i, (long long)length, (long long)s->table[i], (long long)s->entries);
    for (int64_t b = from / c.block; b <= last; b++)
      check_block(c, i, s->blocks[s->table[i] + b], std::min(c.block, length - b * c.block));
  }
  return s->begin[s->count];
}

}  // namespace mh
