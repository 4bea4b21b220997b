// The experts' forward pass. Two phases for each group of blocks: rows through up, bias and activation; then, by
// columns of the output, through down, bias and the weighted sum. A column of y belongs to one task, which adds the
// experts in their order: the result does not depend on the number of threads.
#include <string.h>

#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {
namespace {

constexpr int64_t kTileRoom = 8;  // rows of floats by which a block in tiles may take more than its own

struct PanelWalk {  // the panels of a task, up to `end`; then another expert's from `next_first` on
  const Matrix& m;
  int64_t expert, end, next_expert, next_first;

  // At most `most` panels from p on, and as many after them that will be multiplied next.
  int64_t take(int64_t p, int64_t most, Panel* panels) const {
    const int64_t n = end - p < most ? end - p : most;
    int64_t all = 0, to = p + n;
    for (; all < n; all++) panels[all] = m.panel(expert, p + all);
    for (; all < 2 * n && to < end; all++, to++) panels[all] = m.panel(expert, to);
    for (int64_t q = next_first; all < 2 * n && q < m.size.panels; all++, q++) panels[all] = m.panel(next_expert, q);
    for (int64_t i = 0; i + 1 < all; i++) panels[i].next = panels + i + 1;
    return n;
  }
};

struct Forward {
  const Kernels& k;
  Experts e;
  Sorted s = {};
  int64_t threads;
  bool exact;
  Floats x = {};
  Halves half_x = {};
  uint16_t* laid = nullptr;  // a group's rows in tiles, where several tasks take a block's
  float* act = nullptr;      // a group's activations
  int64_t act_stride = 0;
  float *hidden, *y = nullptr;
  int64_t y_stride = 0;
  IntList qx = {};      // tokens, where up is of integers
  IntBlocks qact = {};  // a group's activations, where down is
  std::vector<const float*> x_rows = {};

  void lay(const Block& b, uint16_t* tiles) const {
    const uint16_t* rows[kBlockRows];
    for (int64_t i = 0; i < b.rows(); i++) rows[i] = half_x.row(s.token[b.begin + i]);
    k.lay_rows(rows, b.rows(), e.up.size.depth, e.up.format().plain, tiles);
  }
  uint16_t* laid_of(const Block& b, const Block* group) const {
    return laid + (b.begin - group->begin + 16 * (&b - group)) * e.up.size.depth;
  }

  RowBlock up_rows(const Block& b, const Block* group, const Worker& w) const {
    RowBlock in(b.rows(), e.up, k, exact);
    const float* const* at = in.is_tiles ? nullptr : x_rows.data() + b.begin;
    if (in.is_integer) {
      const IntBlock block(qx.shape, in.count, k.integer_tile(in.count, e.up.m.format), w.rounded);
      for (int64_t i = 0; i < in.count; i++) block.copy(i, qx.row(s.token[b.begin + i]));
      block.clear_rest();
      in.integers = block.rows();
    } else if (in.is_tiles) {
      if (!laid) lay(b, w.rounded);
      in.tiles = {laid ? laid_of(b, group) : w.rounded, in.count};
    } else if (in.is_few) {
      for (int64_t i = 0; i < in.count; i++) in.row[i] = {at[i]};
    } else {
      float* panels = reinterpret_cast<float*>(w.rounded);
      gather(at, in.count, e.up.size.depth, panels);
      in.matrix = {panels, in.count};
    }
    return in;
  }

  // Where a block's activations are; `group` is the group's first block. A tile of 16 rows takes 8 as floats.
  float* act_of(const Block& b, const Block* group) const {
    return act + (b.begin - group->begin + kTileRoom * (&b - group)) * act_stride;
  }

  // A block's rows of integers for down.
  IntBlock act_integers(const Block& b, const Block* group) const {
    return qact.block(&b - group, b.begin - group->begin, b.rows(), k.integer_tile(b.rows(), e.down.m.format));
  }

  RowBlock down_rows(const Block& b, const Block* group) const {
    RowBlock in(b.rows(), e.down, k, exact);
    const float* at = act_of(b, group);
    if (in.is_integer)
      in.integers = act_integers(b, group).rows();
    else if (in.is_tiles)
      in.tiles = {reinterpret_cast<const uint16_t*>(at), in.count};
    else if (in.is_few)
      for (int64_t i = 0; i < in.count; i++) in.row[i] = {at + i * act_stride};
    else
      in.matrix = {at, in.count};
    return in;
  }

  bool act_in_rows(int64_t rows) const { return e.down.format().integer || few(rows, e.down, exact); }

  // 16 columns of a block's activations, from gate and up (the same where up is alone). They lie in tiles as down takes
  // them, in rows where they are rounded to integers or the vector path takes them, else in panels, [panels][rows][16].
  void activate(const Block& b, const Block* group, int64_t column, float* gate, const float* up) const {
    const int64_t rows = b.rows(), depth = e.down.size.depth;
    float* out = act_of(b, group);
    if (in_tiles(rows, e.down, k, exact)) {
      k.activate(static_cast<int>(e.activation), gate, up, rows, gate, 16);
      k.lay_columns(gate, rows, column, depth, e.down.format().plain, reinterpret_cast<uint16_t*>(out));
      return;
    }
    const bool in_rows = act_in_rows(rows);
    out += column * (in_rows ? 1 : rows);
    k.activate(static_cast<int>(e.activation), gate, up, rows, out, in_rows ? act_stride : 16);
  }

  // A block's rows through `count` panel groups (gate and up, or up alone) from `first` on. `hidden`, block by block in
  // panels, is what the activation was applied to.
  void up_task(const Block& b, const Block* group, int64_t first, int64_t count, Worker w) {
    const int64_t rows = b.rows(), parts = e.parts, end = parts * (first + count);
    const RowBlock in = up_rows(b, group, w);
    const PanelWalk walk{e.up, b.expert, end, s.after(b).expert, 0};
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

  // Zeros beyond F: an infinite x times the zero padding of a weight is NaN, which must not spread.
  void pad_act(const Block& b, float* out) {
    const int64_t rows = b.rows(), wide = e.up.size.panels / e.parts * 16;
    if (in_tiles(rows, e.down, k, exact)) {
      const std::vector<float> zeros(static_cast<size_t>(16 * rows));
      for (int64_t column = wide; column < act_stride; column += 16)
        k.lay_columns(zeros.data(), rows, column, act_stride, e.down.format().plain, reinterpret_cast<uint16_t*>(out));
    } else if (act_in_rows(rows))
      for (int64_t i = 0; i < rows; i++) memset(out + i * act_stride + wide, 0, (act_stride - wide) * sizeof(float));
    else
      memset(out + wide * rows, 0, (act_stride - wide) * rows * sizeof(float));
  }

  void down_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w) {
    for (const Block* b = blocks; b < blocks + count; b++) {
      const RowBlock in = down_rows(*b, blocks);
      const PanelWalk walk{e.down, b->expert, end, s.after(*b).expert, first};
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

  void group(const Block* blocks, size_t count) {
    const int64_t begin = blocks[0].begin, rows = blocks[count - 1].end - begin;
    int64_t most = 0;
    for (const Block* b = blocks; b < blocks + count; b++) most = b->rows() > most ? b->rows() : most;
    act = workspaces().act.floats((rows + kTileRoom * static_cast<int64_t>(count)) * act_stride);
    for (const Block* b = blocks; b < blocks + count; b++) pad_act(*b, act_of(*b, blocks));
    const int64_t depth = e.up.size.depth > e.down.size.depth ? e.up.size.depth : e.down.size.depth;
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(worker_floats(most, depth));

    const int64_t wide = e.up.size.panels / e.parts;
    int64_t pieces = divide_up(8 * threads, static_cast<int64_t>(count));
    pieces = pieces < wide ? pieces : wide;
    laid = nullptr;
    if (half_x.data && pieces > 1) {
      const int64_t padded = rows + 16 * static_cast<int64_t>(count);
      laid = reinterpret_cast<uint16_t*>(workspaces().gathered.floats(padded * e.up.size.depth / 2));
      parallel(threads, static_cast<int64_t>(count), [&](int64_t task, int64_t) {
        const Block& b = blocks[task];
        if (in_tiles(b.rows(), e.up, k, exact)) lay(b, laid_of(b, blocks));
      });
    }
    parallel(threads, static_cast<int64_t>(count) * pieces, [&](int64_t task, int64_t worker) {
      const Block& b = blocks[task / pieces];
      const int64_t piece = task % pieces, first = piece * wide / pieces, end = (piece + 1) * wide / pieces;
      up_task(b, blocks, first, end - first, Worker(workspaces().worker[worker], most));
    });

    if (e.down.format().integer) {
      qact.prepare({e.down, k}, rows, static_cast<int64_t>(count), workspaces().integers[1]);
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
      down_task(blocks, count, first, end, Worker(workspaces().worker[worker], most));
    });
  }

  void all(const mh_rows& in, const mh_rows& out) {
    bool any_tiles = false, all_tiles = true;
    for (const Block& b : s.blocks) {
      const bool tiles = in_tiles(b.rows(), e.up, k, exact);
      any_tiles = any_tiles || tiles, all_tiles = all_tiles && tiles;
    }
    if (any_tiles) half_x = as_halves(in, e.up.size.depth, workspaces().halves, k, threads);
    if (!all_tiles) {
      x = as_floats(in, e.up.size.depth, workspaces().x, k, threads);
      x_rows.resize(static_cast<size_t>(s.rows()));
      for (int64_t i = 0; i < s.rows(); i++) x_rows[i] = x.row(s.token[i]);
    }
    if (e.up.format().integer && !all_tiles) {
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
    Forward f{.k = *k,
              .e = checked_experts(packed, stacked),
              .threads = run->threads,
              .exact = run->exact != 0,
              .hidden = hidden};
    f.s = sort_pairs(routing, f.e.num_experts);
    check_rows(x, routing->tokens, f.e.D, "x");
    check_rows(y, routing->tokens, f.e.D, "y");
    if (hidden) check_hidden(hidden, hidden_count, f.s.rows() * f.e.up.size.panels * 16);
    Call call(routing->tokens);
    f.all(*x, *y);
    workspaces().trim();
  });
}
