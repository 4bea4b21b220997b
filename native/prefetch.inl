// Weights fetched to the second cache while others are multiplied.
#pragma once

#include "loops.inl"

namespace {

constexpr int64_t kPrefetchBytes = 2048;  // bytes a dot fetches ahead; 512 and 4096 were up to a tenth slower (Zen 3)

inline bool is_plain(const Panel& p) { return mh::kFormats[p.format].plain; }

// Inputs [k, k + n) of some panels, a line of the cache at a time.
struct Prefetcher {
  const uint8_t* pieces[kChunk];
  int64_t count = 0, bytes = 0, piece = 0, done = 0;

  Prefetcher(const Panel* panels, int64_t panel_count, int64_t k, int64_t n) {
    if (!panel_count || k >= panels->inputs) return;
    const bool plain = is_plain(*panels);
    const int64_t width = mh::kFormats[panels->format].bits * (plain ? 1 : 16);
    bytes = least(n, panels->inputs - k) * width / 8;
    for (const Panel* p = panels; p < panels + panel_count; p++)
      for (int64_t i = 0; i < (plain ? p->rows : 1); i++) pieces[count++] = p->data + (i * p->inputs + k) * width / 8;
  }
  void next_line() {
    if (piece == count) return;
    __builtin_prefetch(pieces[piece] + done, 0, 2);
    done += 64;
    const bool over = done >= bytes;
    piece += over, done = over ? 0 : done;
  }
  void catch_up(int64_t steps) {  // fetches at once what `steps` more lines would not reach
    for (int64_t i = (count - piece) * ((bytes + 63) / 64); i > steps; i--) next_line();
  }
};

}  // namespace
