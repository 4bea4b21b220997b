// The backward pass in float32, for any format (a frozen integer expert passes gradients on to x and to the router).
// Three phases for each group of blocks:
//   1. by rows: dact = dy·Wdown; the router weights' gradient <act, dact>; dh through the activation
//   2. by outputs of the weights: dW = Σ rows, biases likewise
//   3. by columns of dx: dh·Wup, summed over a token's experts in their order
#include "backward.h"

#include <string.h>

namespace mh {
namespace {

struct InFloats : Backward {
  float *act = nullptr, *dh = nullptr, *dyp = nullptr;  // of a group, block by block in panels: [panels][rows][16]
  int64_t begin = 0;

  int64_t offset(const Block& b) const { return b.begin - begin; }

  void rows_task(const Block& b, Worker w) {
    const int64_t rows = b.rows(), wide = e.up.size.panels / e.parts;
    gather(dy_rows.data() + b.begin, rows, dy_stride, dyp + offset(b) * dy_stride);
    const Rows matrix{dyp + offset(b) * dy_stride, rows};
    float* dweight = w.second;
    for (int64_t i = 0; i < rows; i++) dweight[i] = 0;
    float *dh_block = dh + offset(b) * h_stride, *act_block = act + offset(b) * act_stride;
    const float* h = hidden + b.begin * h_stride;
    const std::vector<Panel> down = e.down.all_panels(b.expert), other = e.down.all_panels(s.after(b).expert);
    const Columns first{other.data(), e.down.size.panels, 0, kColumnBlocks};
    for (int64_t p = 0; p < wide; p += kColumnBlocks) {
      const int64_t n = wide - p < kColumnBlocks ? wide - p : kColumnBlocks;
      const Columns now{down.data(), e.down.size.panels, p, n},
          next{down.data(), e.down.size.panels, p + n, kColumnBlocks};
      k.product_transposed(now, p + n < wide ? next : first, matrix, w.scratch, w.first, w.c_stride);
      for (int64_t q = 0; q < n; q++) {
        const int64_t column = (p + q) * 16 * rows;
        k.activate_grad(static_cast<int>(e.activation), h + e.parts * column, w.first + q * w.c_stride,
                        s.weight.data() + b.begin, rows, dh_block + e.parts * column, 16 * rows, act_block + column,
                        dweight);
      }
    }
    weight_gradients(b, dweight);
  }

  struct Outer {  // dW [outputs][inputs] += Σ a[m][output]·b[m][input], both in panels
    const float *a, *b;
    const float* scale;  // of each row of a for dbias, or null
    int64_t rows, parts, outputs, inputs;
    float *dw, *dbias;
    bool fresh;
  };

  // Output panels [first, end).
  void outer_task(const Outer& o, int64_t first, int64_t end) {
    float c[256];
    for (int64_t p = first; p < end; p++) {
      const float* a = o.a + p * o.rows * 16;
      const int64_t row = p / o.parts * 16, to_row = (p % o.parts) * o.outputs + row;
      const int64_t rows = o.outputs - row < 16 ? o.outputs - row : 16;
      if (o.dbias) {
        float sums[16] = {};
        for (int64_t i = 0; i < o.rows; i++)
          for (int j = 0; j < 16; j++) sums[j] += (o.scale ? o.scale[i] : 1.0f) * a[16 * i + j];
        for (int64_t j = 0; j < rows; j++) o.dbias[to_row + j] = sums[j] + (o.fresh ? 0 : o.dbias[to_row + j]);
      }
      for (int64_t q = 0; o.dw && 16 * q < o.inputs; q++) {
        const int64_t n = o.inputs - 16 * q < 16 ? o.inputs - 16 * q : 16;
        const float* b = o.b + q * o.rows * 16;
        float* to = o.dw + to_row * o.inputs + 16 * q;
        if (rows == 16 && n == 16) {
          k.outer(a, b, o.rows, to, o.inputs, o.fresh);
          continue;
        }
        for (int64_t i = 0; !o.fresh && i < rows; i++) memcpy(c + 16 * i, to + i * o.inputs, n * sizeof(float));
        k.outer(a, b, o.rows, c, 16, o.fresh);
        for (int64_t i = 0; i < rows; i++) memcpy(to + i * o.inputs, c + 16 * i, n * sizeof(float));
      }
    }
  }

  // One block's share of an expert's dW, up or down.
  void weights_task(const Block& b, bool up, int64_t piece, int64_t pieces, bool fresh, float* scratch) {
    const Matrix& m = up ? e.up : e.down;
    float *dw = up ? g.up : g.down, *dbias = up ? g.up_bias : g.down_bias;
    Outer o{};
    o.rows = b.rows(), o.parts = m.m.parts, o.outputs = m.m.outputs, o.inputs = m.m.inputs, o.fresh = fresh;
    o.dw = dw ? dw + b.expert * o.parts * o.outputs * o.inputs : nullptr;
    o.dbias = dbias ? dbias + b.expert * o.parts * o.outputs : nullptr;
    if (up) {
      o.a = dh + offset(b) * h_stride, o.b = scratch;
      if (o.dw) gather(x_rows.data() + b.begin, o.rows, round_up(e.D, 16), scratch);
    } else {  // act already carries the router's weight, the bias does not
      o.a = dyp + offset(b) * dy_stride, o.b = act + offset(b) * act_stride, o.scale = s.weight.data() + b.begin;
    }
    outer_task(o, piece * m.size.panels / pieces, (piece + 1) * m.size.panels / pieces);
  }

  void dx_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w) {
    std::vector<Panel> up = e.up.all_panels(blocks->expert), after;
    for (const Block* b = blocks; b < blocks + count; b++) {
      const int64_t rows = b->rows();
      const Rows matrix{dh + offset(*b) * h_stride, rows};
      after = e.up.all_panels(s.after(*b).expert);
      const Columns begin{after.data(), e.up.size.panels, first, kColumnBlocks};
      for (int64_t p = first, n; p < end; p += n) {
        n = end - p < kColumnBlocks ? end - p : kColumnBlocks;
        const Columns now{up.data(), e.up.size.panels, p, n}, next{up.data(), e.up.size.panels, p + n, kColumnBlocks};
        k.product_transposed(now, p + n < end ? next : begin, matrix, w.scratch, w.first, w.c_stride);
        const int64_t columns = e.D - 16 * p < 16 * n ? e.D - 16 * p : 16 * n;
        k.combine(w.first, w.c_stride, rows, columns, nullptr, nullptr, s.token.data() + b->begin, dx_stride,
                  dx + 16 * p);
      }
      up.swap(after);
    }
  }

  void weights(const Block* blocks, size_t count) {
    struct Part {  // an expert's blocks
      const Block *begin, *end;
    };
    std::vector<Part> parts;
    int64_t most = 0;
    for (const Block* b = blocks; b < blocks + count; b++) {
      if (parts.empty() || parts.back().begin->expert != b->expert) parts.push_back({b, b});
      parts.back().end = b + 1;
      most = b->rows() > most ? b->rows() : most;
    }
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(most * round_up(e.D, 16));
    const int64_t pieces = divide_up(4 * threads, 2 * static_cast<int64_t>(parts.size()));
    parallel(threads, static_cast<int64_t>(parts.size()) * 2 * pieces, [&](int64_t task, int64_t worker) {
      const Part& part = parts[task / (2 * pieces)];
      const bool up = task / pieces % 2 == 0;
      if (up ? !g.up && !g.up_bias : !g.down && !g.down_bias) return;
      for (const Block* b = part.begin; b < part.end; b++)
        weights_task(*b, up, task % pieces, pieces, b == part.begin && !seen[b->expert],
                     workspaces().worker[worker].floats(0));
    });
    for (const Part& part : parts) seen[part.begin->expert] = 1;
  }

  void group(const Block* blocks, size_t count) {
    begin = blocks[0].begin;
    const int64_t rows = blocks[count - 1].end - begin;
    int64_t most = 0;
    for (const Block* b = blocks; b < blocks + count; b++) most = b->rows() > most ? b->rows() : most;
    act = workspaces().act.floats(rows * act_stride);
    dh = workspaces().dh.floats(rows * h_stride);
    dyp = workspaces().gathered.floats(rows * dy_stride);
    const int64_t depth = h_stride > dy_stride ? h_stride : dy_stride;
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(worker_floats(most, depth));
    parallel(threads, static_cast<int64_t>(count),
             [&](int64_t task, int64_t worker) { rows_task(blocks[task], Worker(workspaces().worker[worker], most)); });
    if (any_weights()) weights(blocks, count);
    if (!dx) return;
    const int64_t panels = divide_up(e.D, 16), chunks = 8 * threads < panels ? 8 * threads : panels;
    parallel(threads, chunks, [&](int64_t task, int64_t worker) {
      dx_task(blocks, count, task * panels / chunks, (task + 1) * panels / chunks,
              Worker(workspaces().worker[worker], most));
    });
  }

  void all() {
    size_t first = 0;
    for (const size_t end : group_blocks(s.blocks, act_stride + h_stride + dy_stride)) {
      group(s.blocks.data() + first, end - first);
      first = end;
    }
  }
};

}  // namespace

void backward_floats(Backward& b) { InFloats{std::move(b)}.all(); }

}  // namespace mh
