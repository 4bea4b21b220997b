// Caches in blocks and the sequences whose positions they hold: checked, and where a position lies.
#pragma once

#include <algorithm>

#include "common.h"

namespace mh {

void check_cache(const mh_cache* c);
// That every position from `start` on to a sequence's last lies in a block that the cache has. Returns the rows.
int64_t check_sequences(const mh_sequences* s, const mh_cache& c);

inline int64_t start_of(const mh_sequences& s, int64_t sequence) { return s.start ? s.start[sequence] : 0; }

inline int64_t sequence_of(const mh_sequences& s, int64_t row) {
  return std::upper_bound(s.begin, s.begin + s.count + 1, row) - s.begin - 1;
}

struct Place {
  int64_t block, slot;
};
inline Place place_of(const mh_sequences& s, const mh_cache& c, int64_t sequence, int64_t position) {
  return {s.blocks[s.table[sequence] + position / c.block], position % c.block};
}
inline int64_t key_at(const mh_cache& c, Place p, int64_t group) {
  return p.block * c.k_block + group * c.k_group + p.slot * c.k_row;
}
inline int64_t value_at(const mh_cache& c, Place p, int64_t group) {
  return p.block * c.v_block + group * c.v_group + p.slot * c.v_row;
}

}  // namespace mh
