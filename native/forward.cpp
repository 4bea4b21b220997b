// The experts' forward pass. Two phases for each group of blocks: rows through up, bias and activation; then, by
// columns of the output, through down, bias and the weighted sum. A column of y belongs to one task, which adds the
// experts in their order: the result does not depend on the number of threads.
#include <string.h>

#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {
namespace {

struct Forward {
  const Kernels& k;
  Experts e;
  Sorted s = {};
  int64_t threads;
  bool exact;
  Floats x = {};
  float* act = nullptr;  // a group's activations
  int64_t act_stride = 0;
  float *hidden, *y = nullptr;
  int64_t y_stride = 0;
  IntList qx = {};      // tokens, where up is of integers
  IntBlocks qact = {};  // a group's activations, where down is
  std::vector<const float*> x_rows = {};

  RowBlock up_rows(const Block& b, const Worker& w) const {
    RowBlock in(b.rows(), e.up, exact);
    const float* const* at = x_rows.data() + b.begin;
    if (in.is_integer) {
      const IntBlock block(qx.shape, in.count, k.integer_tile(in.count, e.up.m.format), w.rounded);
      for (int64_t i = 0; i < in.count; i++) block.copy(i, qx.row(s.token[b.begin + i]));
      block.clear_rest();
      in.integers = block.rows();
    } else if (in.is_few) {
      for (int64_t i = 0; i < in.count; i++) in.row[i] = {at[i]};
    } else {
      in.matrix = matrix_rows(at, in.count, e.up.size.depth, e.up.m.format, k, w.rounded);
    }
    return in;
  }

  // A block's rows of integers for down; `first` is the group's first block.
  IntBlock act_integers(const Block& b, const Block* first) const {
    return qact.block(&b - first, b.begin - first->begin, b.rows(), k.integer_tile(b.rows(), e.down.m.format));
  }

  RowBlock down_rows(const Block& b, const Block* group, const Worker& w) const {
    RowBlock in(b.rows(), e.down, exact);
    const float* at = act + (b.begin - group->begin) * act_stride;
    if (in.is_integer)
      in.integers = act_integers(b, group).rows();
    else if (in.is_few)
      for (int64_t i = 0; i < in.count; i++) in.row[i] = {at + i * act_stride};
    else
      in.matrix = panel_rows(at, in.count, e.down.size.depth, e.down.m.format, k, w.rounded);
    return in;
  }

  bool act_in_rows(int64_t rows) const { return e.down.format().integer || few(rows, e.down, exact); }

  // 16 columns of a block's activations, from gate in w.first and up in w.second or from up alone in w.first. They lie
  // in rows where they are rounded or the vector path takes them next, else in panels, [panels][rows][16].
  void activate(const Block& b, int64_t group_begin, int64_t column, const Worker& w) const {
    const int64_t rows = b.rows();
    const bool in_rows = act_in_rows(rows);
    float* out = act + (b.begin - group_begin) * act_stride + column * (in_rows ? 1 : rows);
    const float* up = e.parts == 2 ? w.second : w.first;
    k.activate(static_cast<int>(e.activation), w.first, up, rows, out, in_rows ? act_stride : 16);
  }

  // A block's rows through `count` panel groups (gate and up, or up alone) from `first` on. `hidden`, block by block in
  // panels, is what the activation was applied to.
  void up_task(const Block& b, int64_t group_begin, int64_t first, int64_t count, Worker w) {
    const int64_t rows = b.rows(), parts = e.parts, end = parts * (first + count);
    const RowBlock in = up_rows(b, w);
    Panel panel = e.up.panel(b.expert, parts * first);
    for (int64_t p = parts * first; p < end; p++) {
      const Panel next = p + 1 < end ? e.up.panel(b.expert, p + 1) : e.up.panel(s.after(b).expert, 0);
      panel.next = &next;
      float* c = p % parts ? w.second : w.first;
      in.times(k, panel, w.scratch, c);
      if (const float* bias = e.up.bias(b.expert, p)) k.add_bias(bias, e.up.outputs_of(p), rows, c);
      if (hidden) memcpy(hidden + b.begin * e.up.size.panels * 16 + p * rows * 16, c, rows * 64);
      if (p % parts == parts - 1) activate(b, group_begin, p / parts * 16, w);
      panel = next;
    }
  }

  // Zeros beyond F: an infinite x times the zero padding of a weight is NaN, which must not spread.
  void pad_act(const Block& b, float* out) {
    const int64_t rows = b.rows(), wide = e.up.size.panels / e.parts * 16;
    if (act_in_rows(rows))
      for (int64_t i = 0; i < rows; i++) memset(out + i * act_stride + wide, 0, (act_stride - wide) * sizeof(float));
    else
      memset(out + wide * rows, 0, (act_stride - wide) * rows * sizeof(float));
  }

  void down_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w) {
    for (const Block* b = blocks; b < blocks + count; b++) {
      const RowBlock in = down_rows(*b, blocks, w);
      Panel panel = e.down.panel(b->expert, first);
      for (int64_t p = first, n; p < end; p += n) {
        n = end - p < kColumnBlocks ? end - p : kColumnBlocks;
        for (int64_t q = 0; q < n; q++) {
          const Panel next =
              p + q + 1 < end ? e.down.panel(b->expert, p + q + 1) : e.down.panel(s.after(*b).expert, first);
          panel.next = &next;
          in.times(k, panel, w.scratch, w.first + q * w.c_stride);
          panel = next;
        }
        const int64_t columns = e.D - 16 * p < 16 * n ? e.D - 16 * p : 16 * n;
        k.combine(w.first, w.c_stride, in.count, columns, e.down.bias(b->expert, p), s.weight.data() + b->begin,
                  s.token.data() + b->begin, y_stride, y + 16 * p);
      }
    }
  }

  void group(const Block* blocks, size_t count) {
    const int64_t begin = blocks[0].begin, rows = blocks[count - 1].end - begin;
    int64_t most = 0;
    for (const Block* b = blocks; b < blocks + count; b++) most = b->rows() > most ? b->rows() : most;
    act = workspaces().act.floats(rows * act_stride);
    for (const Block* b = blocks; b < blocks + count; b++) pad_act(*b, act + (b->begin - begin) * act_stride);
    const int64_t depth = e.up.size.depth > e.down.size.depth ? e.up.size.depth : e.down.size.depth;
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(worker_floats(most, depth, k));

    const int64_t wide = e.up.size.panels / e.parts;
    int64_t pieces = divide_up(8 * threads, static_cast<int64_t>(count));
    pieces = pieces < wide ? pieces : wide;
    parallel(threads, static_cast<int64_t>(count) * pieces, [&](int64_t task, int64_t worker) {
      const Block& b = blocks[task / pieces];
      const int64_t piece = task % pieces, first = piece * wide / pieces, end = (piece + 1) * wide / pieces;
      up_task(b, begin, first, end - first, Worker(workspaces().worker[worker], most));
    });

    if (e.down.format().integer) {
      qact.prepare({e.down, k}, rows, static_cast<int64_t>(count), workspaces().integers[1]);
      parallel(threads, static_cast<int64_t>(count), [&](int64_t task, int64_t) {
        const Block& b = blocks[task];
        const IntBlock to = act_integers(b, blocks);
        const float* from = act + (b.begin - begin) * act_stride;
        for (int64_t i = 0; i < b.rows(); i++) to.set(i, from + i * act_stride, k);
        to.clear_rest();
      });
    }
    int64_t chunks = 8 * threads < e.down.size.panels ? 8 * threads : e.down.size.panels;
    parallel(threads, chunks, [&](int64_t task, int64_t worker) {
      const int64_t first = task * e.down.size.panels / chunks, end = (task + 1) * e.down.size.panels / chunks;
      down_task(blocks, count, first, end, Worker(workspaces().worker[worker], most));
    });
  }

  void all(const mh_rows& in, const mh_rows& out) {
    x = as_floats(in, e.up.size.depth, workspaces().x, k, threads);
    x_rows.resize(static_cast<size_t>(s.rows()));
    for (int64_t i = 0; i < s.rows(); i++) x_rows[i] = x.row(s.token[i]);
    if (e.up.format().integer) {
      qx.prepare({e.up, k}, in.count, workspaces().integers[0]);
      parallel(threads, divide_up(in.count, kQuantRows), [&](int64_t task, int64_t) {
        for (int64_t t = task * kQuantRows; t < in.count && t < (task + 1) * kQuantRows; t++) qx.set(t, x.row(t), k);
      });
    }
    act_stride = e.down.size.depth;
    y_stride = out.dtype == MH_FLOAT32 ? out.stride : e.D;
    y = out.dtype == MH_FLOAT32 ? static_cast<float*>(out.data) : workspaces().y.floats(out.count * e.D);
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
};

}  // namespace
}  // namespace mh

int mh_forward(const mh_experts* packed, const mh_stacked* stacked, const mh_routing* routing, const mh_rows* x,
               const mh_rows* y, float* hidden, int64_t hidden_count, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    Forward f{.k = *k, .e = checked_experts(packed, stacked), .threads = run->threads, .exact = run->exact != 0, .hidden = hidden};
    f.s = sort_pairs(routing, f.e.num_experts);
    check_rows(x, routing->tokens, f.e.D, "x");
    check_rows(y, routing->tokens, f.e.D, "y");
    if (hidden) check_hidden(hidden, hidden_count, f.s.rows() * f.e.up.size.panels * 16);
    Call call(routing->tokens);
    f.all(*x, *y);
    workspaces().trim();
  });
}
