// Attention of any rows of any sequences to their cached keys and values. Rows that share keys (the queries of one
// sequence, the heads of one group) make units; splits of a unit's keys are attended to by tasks and then joined in
// order. Splits begin at a sequence's first real position and do not depend on units, threads or other rows, so that
// nothing of this shows in the result.
#include <math.h>
#include <string.h>

#include <vector>

#include "cache.h"
#include "pool.h"

namespace mh {
namespace {

constexpr int64_t kUnitRows = 240;  // a multiple of every level's kAttendRows
constexpr int64_t kPartsAtOnce = int64_t{2} << 20;  // numbers of parts that wait for their join

struct Unit {
  int64_t sequence, group, first, rows;  // rows [first, first + rows) of (query, head of the group), query by query
  int64_t split, splits;                 // the first that anybody sees, and how many from there
  int64_t parts, task;                   // where its parts and tasks are among a pass's
};

struct Attend {
  const Kernels& k;
  const mh_attention& a;
  const mh_sequences& s;
  const mh_cache& c;
  const float* q;
  float* y;
  int64_t threads;
  const int64_t per_group = a.heads / c.groups, numbers = c.v_width + 2;  // of a part
  const int64_t scratch = attend_scratch(kUnitRows, c.k_width + c.v_width);

  struct Seen {  // positions, from the sequence's first real one on
    int64_t from, to;
  };
  Seen seen(int64_t sequence, int64_t query) const {
    const int64_t to = s.first[sequence] + query + 1 - start_of(s, sequence);
    const int64_t from = a.window && to > a.window ? to - a.window : 0;
    return {from, to > 0 ? to : 0};
  }
  int64_t row_of(const Unit& u, int64_t r) const {  // of q and y
    const int64_t i = u.first + r;
    return (s.begin[u.sequence] + i / per_group) * a.heads + u.group * per_group + i % per_group;
  }

  std::vector<Unit> units(int64_t most) const {
    std::vector<Unit> all;
    for (int64_t i = 0; i < s.count; i++)
      for (int64_t g = 0; g < c.groups; g++)
        for (int64_t n = (s.begin[i + 1] - s.begin[i]) * per_group, at = 0; at < n; at += most) {
          const int64_t rows = std::min(most, n - at);
          const int64_t from = seen(i, at / per_group).from / kSplitKeys;
          const int64_t to = divide_up(seen(i, (at + rows - 1) / per_group).to, kSplitKeys);
          all.push_back({i, g, at, rows, from, to > from ? to - from : 0, 0, 0});
        }
    return all;
  }

  void all() {
    int64_t most = kUnitRows;
    std::vector<Unit> every = units(most);
    for (; most > 4; every = units(most)) {
      int64_t tasks = 0;
      for (const Unit& u : every) tasks += u.splits;
      if (tasks >= 4 * threads) break;
      most /= 2;
    }
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(scratch);
    for (size_t first = 0, last = 0; first < every.size(); first = last) {
      int64_t parts = 0, tasks = 0;
      for (; last < every.size() && (last == first || parts < kPartsAtOnce); last++) {
        every[last].parts = parts, every[last].task = tasks;
        parts += every[last].rows * every[last].splits * numbers, tasks += every[last].splits;
      }
      pass(every.data() + first, static_cast<int64_t>(last - first), tasks, workspaces().act.floats(parts));
    }
  }

  void pass(const Unit* units, int64_t count, int64_t tasks, float* parts) {
    parallel(threads, tasks, [&](int64_t task, int64_t worker) {
      const Unit* u = std::upper_bound(units, units + count, task, [](int64_t t, const Unit& x) { return t < x.task; });
      u--;
      attend(*u, u->split + task - u->task, parts + u->parts + (task - u->task) * u->rows * numbers, workspaces().worker[worker].floats(scratch));
    });
    const int64_t joins = tasks > 8 ? count : 1;
    parallel(threads, joins, [&](int64_t task, int64_t) {
      for (int64_t i = task * count / joins; i < (task + 1) * count / joins; i++)
        for (int64_t r = 0; r < units[i].rows; r++) join(units[i], r, parts + units[i].parts);
    });
  }

  // A part is [rows][v_width], then the rows' largest logits, then their totals.
  void attend(const Unit& u, int64_t split, float* part, float* scratch) const {
    const float* rows[kUnitRows];
    int32_t from[kUnitRows], to[kUnitRows];
    float *largest = part + u.rows * c.v_width, *total = largest + u.rows;
    const int64_t base = split * kSplitKeys;
    int64_t first = -1, end = -1;  // rows that see anything here are next to each other
    for (int64_t r = 0; r < u.rows; r++) {
      const Seen see = seen(u.sequence, (u.first + r) / per_group);
      rows[r] = q + row_of(u, r) * c.k_width;
      from[r] = static_cast<int32_t>(std::clamp<int64_t>(see.from - base, 0, kSplitKeys));
      to[r] = static_cast<int32_t>(std::clamp<int64_t>(see.to - base, 0, kSplitKeys));
      largest[r] = -INFINITY;
      if (from[r] >= to[r]) continue;
      if (first < 0) first = r;
      end = r + 1;
    }
    if (first < 0) return;
    KvRun runs[kSplitKeys + 1];
    int64_t count = 0;
    const int64_t keys = to[end - 1], position = start_of(s, u.sequence) + base;
    for (int64_t i = 0; i < keys; i += runs[count++].keys) {
      const int64_t size = c.dtype == MH_BF16 ? 2 : 4;
      const Place at = place_of(s, c, u.sequence, position + i);
      runs[count] = {static_cast<const char*>(c.k) + key_at(c, at, u.group) * size,
                     static_cast<const char*>(c.v) + value_at(c, at, u.group) * size,
                     std::min(keys - i, c.block - at.slot)};
    }
    k.attend({rows + first, from + first, to + first, end - first, runs, count, keys, c.dtype == MH_BF16, c.k_row,
              c.v_row, c.k_width, c.v_width, static_cast<float>(a.scale), static_cast<float>(a.cap), scratch,
              largest + first, total + first, part + first * c.v_width});
  }

  void join(const Unit& u, int64_t r, const float* parts) const {
    const int64_t row = row_of(u, r), next = u.rows * numbers;
    const float *largest = parts + u.rows * c.v_width + r, *part = parts + r * c.v_width;
    const float* sink = a.sinks ? a.sinks + row % a.heads : nullptr;
    k.join({largest, largest + u.rows, part, u.splits, next, next, c.v_width, sink}, y + row * c.v_width);
  }
};

}  // namespace
}  // namespace mh

int mh_attend(const mh_attention* a, const mh_sequences* s, const float* q, const mh_cache* c, float* y,
              const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* kernels = checked_kernels(run);
    check_cache(c);
    need(a, "the attention");
    need(q, "q");
    need(y, "y");
    if (a->heads < 1 || a->heads % c->groups)
      fail(MH_BAD_ARGUMENT, "%lld heads are not a multiple of %lld groups of keys and values", (long long)a->heads,
           (long long)c->groups);
    if (a->window < 0) fail(MH_BAD_ARGUMENT, "a window of %lld positions", (long long)a->window);
    const int64_t rows = check_sequences(s, *c);
    Call call(rows);
    Attend{*kernels, *a, *s, *c, q, y, run->threads}.all();
    workspaces().trim();
  });
}
