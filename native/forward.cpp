// The experts' forward pass. Two phases for each group of blocks: rows through up, bias and activation; then, by
// columns of the output, through down, bias and the weighted sum. A column of y belongs to one task, which adds the
// experts in their order: the result does not depend on the number of threads, nor on the order in which experts went
// through up. So the ones that are in memory go first, and the others as they come.
#include "forward.h"

#include <string.h>

#include <memory>

namespace mh {
namespace {

struct PanelWalk {  // the panels of a task, up to `end`; then the next record's, if it is there, from `next_first` on
  const Matrix& m;
  const uint8_t* record;
  int64_t end;
  const uint8_t* next;
  int64_t next_first;

  // At most `most` panels from p on, and as many after them that will be multiplied next.
  int64_t take(int64_t p, int64_t most, Panel* panels) const {
    const int64_t n = end - p < most ? end - p : most;
    int64_t all = 0, to = p + n;
    for (; all < n; all++) panels[all] = m.panel(record, p + all);
    for (; all < 2 * n && to < end; all++, to++) panels[all] = m.panel(record, to);
    if (next)
      for (int64_t q = next_first; all < 2 * n && q < m.size.panels; all++, q++) panels[all] = m.panel(next, q);
    for (int64_t i = 0; i + 1 < all; i++) panels[i].next = panels + i + 1;
    return n;
  }
};

}  // namespace

// A block's rows through `count` panel groups (gate and up, or up alone) from `first` on. `hidden`, block by block in
// panels, is what the activation was applied to.
void Forward::up_task(const Block& b, const Block* group, int64_t first, int64_t count, Worker w) {
  const int64_t rows = b.rows(), parts = e.parts, end = parts * (first + count);
  const RowBlock in = up_rows(b, group, w);
  const PanelWalk walk{e.up, e.up.record(b.expert), end, e.up.record(s.after(b).expert), 0};
  for (int64_t p = parts * first, n; p < end; p += n) {
    Panel panels[4];
    n = walk.take(p, 2, panels);
    in.times(k, panels, n, w.scratch, w.first, w.c_stride);
    for (int64_t q = 0; q < n; q++) {
      float *c = w.first + q * w.c_stride, *gate = c - (parts - 1) * w.c_stride;
      if (const float* bias = e.up.bias(b.expert, p + q)) k.add_bias(bias, e.up.outputs_of(p + q), rows, c);
      if (hidden) memcpy(hidden + b.begin * e.up.size.panels * 16 + (p + q) * rows * 16, c, rows * 64);
      if (q % parts == parts - 1) activate(b, group, (p + q) / parts * 16, gate, c);
    }
  }
}

// Some of a group's blocks through up; `most` are the rows of its largest.
void Forward::up(const Blocks& some, const Block* group, int64_t most) {
  const int64_t count = static_cast<int64_t>(some.size()), wide = e.up.size.panels / e.parts;
  if (!count) return;
  int64_t pieces = divide_up(8 * threads, count);
  pieces = pieces < wide ? pieces : wide;
  laid = nullptr;
  if (half_x.data && pieces > 1) {
    const Block& last = *some.back();
    const int64_t padded = last.end - group->begin + 16 * (&last - group + 1);
    laid = reinterpret_cast<uint16_t*>(room.gathered.floats(padded * e.up.size.depth / 2));
    parallel(threads, count, [&](int64_t task, int64_t) {
      const Block& b = *some[task];
      if (in_tiles(b.rows(), e.up, k, exact)) lay(b, laid_of(b, group));
    });
  }
  parallel(threads, count * pieces, [&](int64_t task, int64_t worker) {
    const Block& b = *some[task / pieces];
    const int64_t piece = task % pieces, first = piece * wide / pieces, end = (piece + 1) * wide / pieces;
    up_task(b, group, first, end - first, Worker(room.worker[worker], most));
  });
}

void Forward::down_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w) {
  for (const Block* b = blocks; b < blocks + count; b++) {
    const RowBlock in = down_rows(*b, blocks);
    const PanelWalk walk{e.down, e.down.record(b->expert), end, e.down.record(s.after(*b).expert), first};
    for (int64_t p = first, n; p < end; p += n) {
      Panel panels[2 * kColumnBlocks];
      n = walk.take(p, kColumnBlocks, panels);
      in.times(k, panels, n, w.scratch, w.first, w.c_stride);
      const int64_t columns = e.D - 16 * p < 16 * n ? e.D - 16 * p : 16 * n;
      k.combine(w.first, w.c_stride, in.count, columns, e.down.bias(b->expert, p), s.weight.data() + b->begin,
                s.token.data() + b->begin, y_stride, y + 16 * p);
    }
  }
}

void Forward::group(const Block* blocks, size_t count) {
  const int64_t begin = blocks[0].begin, rows = blocks[count - 1].end - begin;
  int64_t most = 0;
  Blocks ready, late;
  for (const Block* b = blocks; b < blocks + count; b++) {
    most = b->rows() > most ? b->rows() : most;
    (e.up.record(b->expert) ? ready : late).push_back(b);
  }
  act = room.act.floats((rows + kActTileRoom * static_cast<int64_t>(count)) * act_stride);
  for (const Block* b = blocks; b < blocks + count; b++) pad_act(*b, act_of(*b, blocks));
  const int64_t depth = e.up.size.depth > e.down.size.depth ? e.up.size.depth : e.down.size.depth;
  for (int64_t i = 0; i < threads; i++) room.worker[i].floats(worker_floats(most, depth));

  up(ready, blocks, most);
  for (size_t i = 0, end; i < late.size(); i = end) {
    for (end = i + 1; end < late.size() && late[end]->expert == late[i]->expert;) end++;
    arrivals->wait(late[i]->expert);
    up(Blocks(late.begin() + static_cast<int64_t>(i), late.begin() + static_cast<int64_t>(end)), blocks, most);
  }

  if (e.down.format().integer) {
    qact.prepare({e.down, k}, rows, static_cast<int64_t>(count), room.integers[1]);
    parallel(threads, static_cast<int64_t>(count), [&](int64_t task, int64_t) {
      const Block& b = blocks[task];
      const IntBlock to = act_integers(b, blocks);
      const float* from = act_of(b, blocks);
      for (int64_t i = 0; i < b.rows(); i++) to.set(i, from + i * act_stride, k);
      to.clear_rest();
    });
  }
  int64_t chunks = 8 * threads < e.down.size.panels ? 8 * threads : e.down.size.panels;
  parallel(threads, chunks, [&](int64_t task, int64_t worker) {
    const int64_t first = task * e.down.size.panels / chunks, end = (task + 1) * e.down.size.panels / chunks;
    down_task(blocks, count, first, end, Worker(room.worker[worker], most));
  });
}

void Forward::all(const mh_rows& in, const mh_rows& out) {
  take_rows(in);
  act_stride = e.down.size.depth;
  y_stride = out.dtype == MH_FLOAT32 ? out.stride : e.D;
  y = out.dtype == MH_FLOAT32 ? static_cast<float*>(out.data) : room.y.floats(out.count * e.D);
  for (int64_t t = 0; t < out.count; t++) memset(y + t * y_stride, 0, e.D * sizeof(float));
  size_t first = 0;
  for (const size_t end : group_blocks(s.blocks, act_stride)) {
    group(s.blocks.data() + first, end - first);
    first = end;
  }
  if (out.dtype == MH_BF16)
    for (int64_t t = 0; t < out.count; t++)
      k.narrow(y + t * e.D, e.D, static_cast<uint16_t*>(out.data) + t * out.stride);
}

int run_experts(const mh_experts* packed, const mh_stacked* stacked, const mh_routing* routing, const mh_rows* x,
                const mh_rows* y, float* hidden, int64_t hidden_count, const mh_fetch* fetch, const mh_run* run) {
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    Experts e = checked_experts(packed, stacked);
    Sorted s = sort_pairs(routing, e.num_experts);
    check_rows(x, routing->tokens, e.D, "x");
    check_rows(y, routing->tokens, e.D, "y");
    if (hidden) check_hidden(hidden, hidden_count, s.rows() * e.up.size.panels * 16);
    const bool late = !check_records(s, e, fetch != nullptr);
    // Where it waits, other calls come between, and the process's workspaces are theirs.
    const std::unique_ptr<Workspaces> own(late ? new Workspaces : nullptr);
    Call call(routing->tokens);
    Arrivals arrivals(fetch, call);
    if (late) e.up.table = e.down.table = arrivals.copy(e);
    Forward{.k = *k,
            .e = e,
            .room = late ? *own : workspaces(),
            .arrivals = &arrivals,
            .threads = run->threads,
            .exact = run->exact != 0,
            .hidden = hidden,
            .s = std::move(s)}
        .all(*x, *y);
    if (!late) workspaces().trim();
  });
}

}  // namespace mh

int mh_forward(const mh_experts* packed, const mh_stacked* stacked, const mh_routing* routing, const mh_rows* x,
               const mh_rows* y, float* hidden, int64_t hidden_count, const mh_run* run) {
  return mh::run_experts(packed, stacked, routing, x, y, hidden, hidden_count, nullptr, run);
}
