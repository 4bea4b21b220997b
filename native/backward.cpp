// The experts' backward pass, for any format (a frozen integer expert passes gradients on to x and to the router).
// Three phases for each group of blocks:
//   1. by rows: dact = dy·Wdown; the router weights' gradient <act, dact>; dh through the activation
//   2. by outputs of the weights: dW = Σ rows, biases likewise
//   3. by columns of dx: dh·Wup, summed over a token's experts in their order
// Each number belongs to one task, so that the result does not depend on the number of threads.
#include <string.h>

#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {
namespace {

constexpr int64_t kOuterChunk = 192;  // rows multiplied at a time for dW: two panels of them fit the first cache

struct Backward {
  const Kernels& k;
  Experts e;
  Sorted s;
  int64_t threads;
  const float* hidden;
  const mh_gradients& g;
  Floats x, dy;
  float *act, *dh, *dx;
  int64_t act_stride, h_stride, dx_stride, begin;
  std::vector<const float*> x_rows, dy_rows, dh_rows, act_rows;
  std::vector<char> seen;  // experts whose weight gradient has been begun

  static float inner(const float* a, const float* b, int64_t n) {
    float lanes[16] = {}, total = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; j++) lanes[j] += a[i + j] * b[i + j];
    for (; i < n; i++) lanes[i % 16] += a[i] * b[i];
    for (const float lane : lanes) total += lane;
    return total;
  }

  void rows_task(const Block& b, Worker w) {
    const int64_t rows = b.rows(), depth = e.down.panels * 16;
    const Rows matrix = matrix_rows(dy_rows.data() + b.begin, rows, depth, e.down.m.format, k, w.rounded);
    float* dweight = w.second;
    for (int64_t i = 0; i < rows; i++) dweight[i] = 0;
    float *dh_block = dh + (b.begin - begin) * h_stride, *act_block = act + (b.begin - begin) * act_stride;
    const float* h = hidden + b.begin * h_stride;
    const std::vector<Panel> down = e.down.all_panels(b.expert);
    for (int64_t p = 0; p < e.up.panels / e.parts; p++) {
      k.product_t(down.data(), e.down.panels, p, matrix, w.scratch, w.first);
      k.activate_grad(static_cast<int>(e.activation), h + 16 * e.parts * p, h_stride, w.first,
                      s.weight.data() + b.begin, rows, dh_block + 16 * e.parts * p, act_block + 16 * p, act_stride,
                      dweight);
    }
    if (!g.weights) return;
    for (int64_t i = 0; i < rows; i++) {
      float bias = 0;
      for (int64_t p = 0; e.down.bias(b.expert, 0) && p < e.down.panels; p++)
        bias += inner(e.down.bias(b.expert, p), dy_rows[b.begin + i] + 16 * p, e.down.outputs_of(p));
      g.weights[s.pair[b.begin + i]] = dweight[i] + bias;
    }
  }

  // [m] rows' columns [16 p, 16 p + 16), as far as there are any, to [m][16].
  static void columns(const float* const* rows, int64_t m, int64_t p, int64_t width, float* to) {
    const int64_t n = width - 16 * p < 16 ? width - 16 * p : 16;
    for (int64_t i = 0; i < m; i++, to += 16) {
      if (n == 16) {
        memcpy(to, rows[i] + 16 * p, 64);
      } else {
        memset(to, 0, 64);
        memcpy(to, rows[i] + 16 * p, n * sizeof(float));
      }
    }
  }

  struct Outer {  // dW [outputs][inputs] += Σ a[m][output]·b[m][input], a in panels of the packed order
    const float *const *a, *const *b;
    const float* scale;  // of each row of a, or null
    int64_t rows, parts, outputs, inputs;
    int64_t a_width;
    float *dw, *dbias;
    bool fresh;
  };

  // Output panels [first, end). `room` holds all input panels of a chunk of rows, one panel of outputs, one tile.
  void outer_task(const Outer& o, int64_t first, int64_t end, float* room) {
    const int64_t in_panels = divide_up(o.inputs, 16);
    float *b = room, *a = b + in_panels * kOuterChunk * 16, *c = a + kOuterChunk * 16;
    for (int64_t m0 = 0; m0 < o.rows; m0 += kOuterChunk) {
      const int64_t m = o.rows - m0 < kOuterChunk ? o.rows - m0 : kOuterChunk;
      const bool fresh = o.fresh && m0 == 0;
      for (int64_t q = 0; o.dw && q < in_panels; q++) columns(o.b + m0, m, q, o.inputs, b + q * m * 16);
      for (int64_t p = first; p < end; p++) {
        columns(o.a + m0, m, p, o.a_width, a);
        for (int64_t i = 0; o.scale && i < m; i++)
          for (int j = 0; j < 16; j++) a[16 * i + j] *= o.scale[m0 + i];
        const int64_t row = p / o.parts * 16, place = (p % o.parts) * o.outputs + row;
        const int64_t rows = o.outputs - row < 16 ? o.outputs - row : 16;
        if (o.dbias) {
          float sums[16] = {};
          for (int64_t i = 0; i < m; i++)
            for (int j = 0; j < 16; j++) sums[j] += a[16 * i + j];
          for (int64_t j = 0; j < rows; j++) o.dbias[place + j] = sums[j] + (fresh ? 0 : o.dbias[place + j]);
        }
        for (int64_t q = 0; o.dw && q < in_panels; q++) {
          const int64_t n = o.inputs - 16 * q < 16 ? o.inputs - 16 * q : 16;
          float* to = o.dw + place * o.inputs + 16 * q;
          if (rows == 16 && n == 16) {
            k.outer(a, b + q * m * 16, m, to, o.inputs, fresh);
            continue;
          }
          for (int64_t i = 0; !fresh && i < rows; i++) memcpy(c + 16 * i, to + i * o.inputs, n * sizeof(float));
          k.outer(a, b + q * m * 16, m, c, 16, fresh);
          for (int64_t i = 0; i < rows; i++) memcpy(to + i * o.inputs, c + 16 * i, n * sizeof(float));
        }
      }
    }
  }

  void dx_task(const Block* blocks, size_t count, int64_t first, int64_t end, Worker w) {
    for (const Block* b = blocks; b < blocks + count; b++) {
      const int64_t rows = b->rows();
      const Rows matrix =
          matrix_rows(dh_rows.data() + (b->begin - begin), rows, h_stride, e.up.m.format, k, w.rounded);
      const std::vector<Panel> up = e.up.all_panels(b->expert);
      for (int64_t p = first; p < end; p++) {
        k.product_t(up.data(), e.up.panels, p, matrix, w.scratch, w.first);
        k.combine(w.first, rows, e.D - 16 * p < 16 ? e.D - 16 * p : 16, nullptr, nullptr, s.token.data() + b->begin,
                  dx_stride, dx + 16 * p);
      }
    }
  }

  void weights(const Block* blocks, size_t count) {
    struct Part {
      int64_t expert, begin, end;
    };
    std::vector<Part> parts;
    for (const Block* b = blocks; b < blocks + count; b++) {
      if (!parts.empty() && parts.back().expert == b->expert)
        parts.back().end = b->end;
      else
        parts.push_back({b->expert, b->begin, b->end});
    }
    const int64_t widest = e.D > e.F ? e.D : e.F, room = (divide_up(widest, 16) + 1) * kOuterChunk * 16 + 256;
    for (int64_t i = 0; i < threads; i++) rooms().worker[i].floats(room);
    const int64_t pieces = divide_up(4 * threads, 2 * static_cast<int64_t>(parts.size()));
    parallel(threads, static_cast<int64_t>(parts.size()) * 2 * pieces, [&](int64_t task, int64_t worker) {
      const Part& part = parts[task / (2 * pieces)];
      const bool up = task / pieces % 2 == 0;
      const Matrix& m = up ? e.up : e.down;
      const int64_t E = part.expert, local = part.begin - begin;
      float *dw = up ? g.up : g.down, *dbias = up ? g.up_bias : g.down_bias;
      if (!dw && !dbias) return;
      Outer o{};
      o.a = up ? dh_rows.data() + local : dy_rows.data() + part.begin;
      o.b = up ? x_rows.data() + part.begin : act_rows.data() + local;
      o.rows = part.end - part.begin, o.parts = m.m.parts, o.outputs = m.m.outputs, o.inputs = m.m.inputs;
      o.a_width = m.panels * 16;
      o.dw = dw ? dw + E * o.parts * o.outputs * o.inputs : nullptr;
      o.dbias = dbias ? dbias + E * o.parts * o.outputs : nullptr;
      o.fresh = !seen[E];
      const int64_t piece = task % pieces, first = piece * m.panels / pieces, end = (piece + 1) * m.panels / pieces;
      float* room = rooms().worker[worker].floats(0);
      if (up) return outer_task(o, first, end, room);
      // act already carries the router's weight; the bias is multiplied with it here.
      Outer bias = o;
      bias.dw = nullptr, bias.scale = s.weight.data() + part.begin, o.dbias = nullptr;
      if (o.dw) outer_task(o, first, end, room);
      if (bias.dbias) outer_task(bias, first, end, room);
    });
    for (const Part& part : parts) seen[part.expert] = 1;
  }

  void group(const Block* blocks, size_t count) {
    begin = blocks[0].begin;
    const int64_t rows = blocks[count - 1].end - begin;
    int64_t most = 0;
    for (const Block* b = blocks; b < blocks + count; b++) most = b->rows() > most ? b->rows() : most;
    act = rooms().act.floats(rows * act_stride);
    dh = rooms().dh.floats(rows * h_stride);
    act_rows.resize(static_cast<size_t>(rows)), dh_rows.resize(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; i++) act_rows[i] = act + i * act_stride, dh_rows[i] = dh + i * h_stride;
    const int64_t depth = h_stride > e.down.panels * 16 ? h_stride : e.down.panels * 16;
    for (int64_t i = 0; i < threads; i++) rooms().worker[i].floats(worker_floats(most, depth, k));
    parallel(threads, static_cast<int64_t>(count), [&](int64_t task, int64_t worker) {
      rows_task(blocks[task], Worker(rooms().worker[worker], most));
    });
    if (g.up || g.down || g.up_bias || g.down_bias) weights(blocks, count);
    if (!dx) return;
    const int64_t panels = divide_up(e.D, 16), chunks = 8 * threads < panels ? 8 * threads : panels;
    parallel(threads, chunks, [&](int64_t task, int64_t worker) {
      dx_task(blocks, count, task * panels / chunks, (task + 1) * panels / chunks,
              Worker(rooms().worker[worker], most));
    });
  }

  void zero_idle(const mh_routing& routing) {
    const int64_t pairs = routing.tokens * routing.per_token;
    if (g.weights) memset(g.weights, 0, pairs * sizeof(float));
    std::vector<char> busy(static_cast<size_t>(e.num_experts), 0);
    for (const Block& b : s.blocks) busy[b.expert] = 1;
    const int64_t up = e.parts * e.F, down = e.D;
    const auto clear = [](float* p, int64_t expert, int64_t n) {
      if (p) memset(p + expert * n, 0, n * sizeof(float));
    };
    for (int64_t i = 0; i < e.num_experts; i++) {
      if (busy[i]) continue;
      clear(g.up, i, up * e.D), clear(g.down, i, down * e.F), clear(g.up_bias, i, up), clear(g.down_bias, i, down);
    }
  }

  void all(const mh_routing& routing, const mh_rows& in, const mh_rows& grad, const mh_rows* out) {
    zero_idle(routing);
    seen.assign(static_cast<size_t>(e.num_experts), 0);
    if (g.up) x = as_floats(in, e.D, rooms().x, k, threads);
    dy = as_floats(grad, e.down.panels * 16, rooms().dact, k, threads);
    x_rows.resize(static_cast<size_t>(s.rows())), dy_rows.resize(static_cast<size_t>(s.rows()));
    for (int64_t i = 0; i < s.rows(); i++) {
      if (g.up) x_rows[i] = x.row(s.token[i]);
      dy_rows[i] = dy.row(s.token[i]);
    }
    dx = nullptr;
    if (out) {
      dx_stride = out->dtype == MH_FLOAT32 ? out->stride : e.D;
      dx = out->dtype == MH_FLOAT32 ? static_cast<float*>(out->data) : rooms().y.floats(out->count * e.D);
      for (int64_t t = 0; t < out->count; t++) memset(dx + t * dx_stride, 0, e.D * sizeof(float));
    }
    act_stride = round_up(e.F, 16);
    h_stride = e.up.panels * 16;
    size_t first = 0;
    for (const size_t end : group_blocks(s.blocks, act_stride + h_stride)) {
      group(s.blocks.data() + first, end - first);
      first = end;
    }
    if (out && out->dtype == MH_BF16)
      for (int64_t t = 0; t < out->count; t++)
        k.narrow(dx + t * e.D, e.D, static_cast<uint16_t*>(out->data) + t * out->stride);
  }
};

}  // namespace
}  // namespace mh

int mh_backward(const mh_experts* packed, const mh_stacked* stacked, const mh_routing* routing, const mh_rows* x, const mh_rows* dy,
                const float* hidden, int64_t hidden_count, const mh_rows* dx, const mh_gradients* gradients,
                const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    if (!gradients) fail(MH_BAD_ARGUMENT, "no gradients");
    Backward b{*k, checked_experts(packed, stacked), {}, run->threads, hidden, *gradients, {}, {}, nullptr, nullptr, nullptr,
               0, 0, 0, 0, {}, {}, {}, {}, {}};
    b.s = sort_pairs(routing, b.e.num_experts);
    check_rows(x, routing->tokens, b.e.D, "x");
    check_rows(dy, routing->tokens, b.e.D, "dy");
    if (dx) check_rows(dx, routing->tokens, b.e.D, "dx");
    if (b.s.rows() && (!hidden || hidden_count < b.s.rows() * b.e.up.panels * 16))
      fail(MH_BAD_ARGUMENT, "hidden is too small");
    Call call;
    b.all(*routing, *x, *dy, dx);
    rooms().trim();
  });
}
