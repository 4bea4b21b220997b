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
  Sorted s;
  int64_t threads;
  Floats x;
  float* act;
  int64_t act_stride;
  float *hidden, *y;
  int64_t y_stride;
  Quantized qx, qact;
  std::vector<const float*> x_rows;

  // Rows through `count` panel groups (gate and up, or up alone) from `first` on. Activations and `hidden` lie block by
  // block in panels, [panels][rows][16]; activations that the vector path takes next lie in rows.
  void up_task(const Block& b, int64_t group_begin, int64_t first, int64_t count, Worker w) {
    const int64_t rows = b.rows(), parts = e.parts, end = parts * (first + count);
    const bool vector = few(rows, e.up), in_rows = few(rows, e.down);
    const float* const* at = x_rows.data() + b.begin;
    Rows matrix{};
    Row row[kFewIntegers];
    if (vector)
      for (int64_t i = 0; i < rows; i++) row[i] = qx.view(s.token[b.begin + i], at[i]);
    else
      matrix = matrix_rows(at, rows, e.up.depth, e.up.m.format, k, w.rounded);
    float* out = act + (b.begin - group_begin) * act_stride;
    Panel panel = e.up.panel(b.expert, parts * first);
    for (int64_t p = parts * first; p < end; p++) {
      const int64_t part = p % parts;
      const Panel next = p + 1 < end ? e.up.panel(b.expert, p + 1) : e.up.panel(s.after(b).expert, 0);
      panel.next = &next;
      float* c = part ? w.second : w.first;
      vector ? dot_few(k, panel, row, rows, c) : k.product(panel, matrix, w.scratch, c);
      if (const float* bias = e.up.bias(b.expert, p)) k.add_bias(bias, e.up.outputs_of(p), rows, c);
      if (hidden) memcpy(hidden + b.begin * e.up.panels * 16 + p * rows * 16, c, rows * 64);
      panel = next;
      if (part + 1 < parts) continue;
      const float* up = parts == 2 ? w.second : w.first;
      const int64_t column = p / parts * 16;
      in_rows ? k.activate(static_cast<int>(e.activation), w.first, up, rows, out + column, act_stride)
              : k.activate(static_cast<int>(e.activation), w.first, up, rows, out + column * rows, 16);
    }
  }

  // Zeros beyond F: an infinite x times the zero padding of a weight is NaN, which must not spread.
  void pad_act(const Block& b, float* out) {
    const int64_t rows = b.rows(), wide = e.up.panels / e.parts * 16;
    if (few(rows, e.down))
      for (int64_t i = 0; i < rows; i++) memset(out + i * act_stride + wide, 0, (act_stride - wide) * sizeof(float));
    else
      memset(out + wide * rows, 0, (act_stride - wide) * rows * sizeof(float));
  }

  void down_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w) {
    const int64_t group_begin = blocks[0].begin;
    for (const Block* b = blocks; b < blocks + count; b++) {
      const int64_t rows = b->rows();
      const bool vector = few(rows, e.down);
      const float* in = act + (b->begin - group_begin) * act_stride;
      Rows matrix{};
      Row row[kFewIntegers];
      if (vector)
        for (int64_t i = 0; i < rows; i++) row[i] = qact.view(b->begin - group_begin + i, in + i * act_stride);
      else
        matrix = panel_rows(in, rows, e.down.depth, e.down.m.format, k, w.rounded);
      Panel panel = e.down.panel(b->expert, first);
      for (int64_t p = first, n; p < end; p += n) {
        n = end - p < kColumnBlocks ? end - p : kColumnBlocks;
        for (int64_t q = 0; q < n; q++) {
          const Panel next =
              p + q + 1 < end ? e.down.panel(b->expert, p + q + 1) : e.down.panel(s.after(*b).expert, first);
          panel.next = &next;
          float* c = w.first + q * w.c_stride;
          vector ? dot_few(k, panel, row, rows, c) : k.product(panel, matrix, w.scratch, c);
          panel = next;
        }
        const int64_t columns = e.D - 16 * p < 16 * n ? e.D - 16 * p : 16 * n;
        k.combine(w.first, w.c_stride, rows, columns, e.down.bias(b->expert, p), s.weight.data() + b->begin,
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
    const int64_t depth = e.up.depth > e.down.depth ? e.up.depth : e.down.depth;
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(worker_floats(most, depth, k));

    const int64_t wide = e.up.panels / e.parts;
    int64_t pieces = divide_up(8 * threads, static_cast<int64_t>(count));
    pieces = pieces < wide ? pieces : wide;
    parallel(threads, static_cast<int64_t>(count) * pieces, [&](int64_t task, int64_t worker) {
      const Block& b = blocks[task / pieces];
      const int64_t piece = task % pieces, first = piece * wide / pieces, end = (piece + 1) * wide / pieces;
      up_task(b, begin, first, end - first, Worker(workspaces().worker[worker], most));
    });

    if (qx.q) {
      qact.prepare(rows, e.down, workspaces().quantized[2], workspaces().quantized[3]);
      parallel(threads, static_cast<int64_t>(count), [&](int64_t task, int64_t) {
        const Block& b = blocks[task];
        for (int64_t i = b.begin; few(b.rows(), e.up) && i < b.end; i++)
          qact.set(i - begin, act + (i - begin) * act_stride, k);
      });
    }
    int64_t chunks = 8 * threads < e.down.panels ? 8 * threads : e.down.panels;
    parallel(threads, chunks, [&](int64_t task, int64_t worker) {
      const int64_t first = task * e.down.panels / chunks, end = (task + 1) * e.down.panels / chunks;
      down_task(blocks, count, first, end, Worker(workspaces().worker[worker], most));
    });
  }

  void all(const mh_rows& in, const mh_rows& out) {
    x = as_floats(in, e.up.depth, workspaces().x, k, threads);
    x_rows.resize(static_cast<size_t>(s.rows()));
    bool any_few = false;
    for (int64_t i = 0; i < s.rows(); i++) x_rows[i] = x.row(s.token[i]);
    for (const Block& b : s.blocks) any_few = any_few || few(b.rows(), e.up);
    if (any_few && is_integer(e.up)) {
      qx.prepare(in.count, e.up, workspaces().quantized[0], workspaces().quantized[1]);
      parallel(threads, in.count, [&](int64_t t, int64_t) { qx.set(t, x.row(t), k); });
    }
    act_stride = e.down.depth;
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
    Forward f{*k, checked_experts(packed, stacked), {}, run->threads, {}, nullptr, 0, hidden, nullptr, 0, {}, {}, {}};
    f.s = sort_pairs(routing, f.e.num_experts);
    check_rows(x, routing->tokens, f.e.D, "x");
    check_rows(y, routing->tokens, f.e.D, "y");
    if (hidden && hidden_count < f.s.rows() * f.e.up.panels * 16) fail(MH_BAD_ARGUMENT, "hidden is too small");
    Call call(routing->tokens);
    f.all(*x, *y);
    workspaces().trim();
  });
}
