#include "backward.h"

#include <string.h>

namespace mh {
namespace {

float inner(const float* a, const float* b, int64_t n) {
  float lanes[16] = {}, total = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += a[i + j] * b[i + j];
  for (; i < n; i++) lanes[i % 16] += a[i] * b[i];
  for (const float lane : lanes) total += lane;
  return total;
}

void zero_idle(const Backward& b, const mh_routing& routing) {
  const mh_gradients& g = b.g;
  const Experts& e = b.e;
  const int64_t pairs = routing.tokens * routing.per_token;
  if (g.weights) memset(g.weights, 0, pairs * sizeof(float));
  std::vector<char> busy(static_cast<size_t>(e.num_experts), 0);
  for (const Block& block : b.s.blocks) busy[block.expert] = 1;
  const int64_t up = e.parts * e.F, down = e.D;
  const auto clear = [](float* p, int64_t expert, int64_t n) {
    if (p) memset(p + expert * n, 0, n * sizeof(float));
  };
  for (int64_t i = 0; i < e.num_experts; i++) {
    if (busy[i]) continue;
    clear(g.up, i, up * e.D), clear(g.down, i, down * e.F), clear(g.up_bias, i, up), clear(g.down_bias, i, down);
  }
}

void all(Backward& b, const mh_routing& routing, const mh_rows& in, const mh_rows& grad, const mh_rows* out) {
  const Experts& e = b.e;
  const Kernels& k = b.k;
  zero_idle(b, routing);
  b.seen.assign(static_cast<size_t>(e.num_experts), 0);
  b.act_stride = round_up(e.F, 16);
  b.h_stride = e.up.size.panels * 16;
  b.dy_stride = e.down.size.panels * 16;
  if (b.g.up) b.x = as_floats(in, round_up(e.D, 16), workspaces().x, k, b.threads);
  b.dy = as_floats(grad, b.dy_stride, workspaces().dact, k, b.threads);
  const size_t rows = static_cast<size_t>(b.s.rows());
  b.x_rows.resize(rows), b.dy_rows.resize(rows);
  for (size_t i = 0; i < rows; i++) {
    if (b.g.up) b.x_rows[i] = b.x.row(b.s.token[i]);
    b.dy_rows[i] = b.dy.row(b.s.token[i]);
  }
  if (out) {
    b.dx_stride = out->dtype == MH_FLOAT32 ? out->stride : e.D;
    b.dx = out->dtype == MH_FLOAT32 ? static_cast<float*>(out->data) : workspaces().y.floats(out->count * e.D);
    for (int64_t t = 0; t < out->count; t++) memset(b.dx + t * b.dx_stride, 0, e.D * sizeof(float));
  }
  const bool tiles = k.tiles && !e.up.format().exact && !e.down.format().exact;
  tiles ? backward_tiles(b) : backward_floats(b);
  if (out && out->dtype == MH_BF16)
    for (int64_t t = 0; t < out->count; t++)
      k.narrow(b.dx + t * e.D, e.D, static_cast<uint16_t*>(out->data) + t * out->stride);
}

}  // namespace

void Backward::weight_gradients(const Block& b, const float* dweight) const {
  for (int64_t i = b.begin; g.weights && i < b.end; i++) {
    float bias = 0;
    for (int64_t p = 0; e.down.bias(b.expert, 0) && p < e.down.size.panels; p++)
      bias += inner(e.down.bias(b.expert, p), dy_rows[i] + 16 * p, e.down.outputs_of(p));
    g.weights[s.pair[i]] = dweight[i - b.begin] + bias;
  }
}

}  // namespace mh

int mh_backward(const mh_experts* packed, const mh_stacked* stacked, const mh_routing* routing, const mh_rows* x,
                const mh_rows* dy, const float* hidden, int64_t hidden_count, const mh_rows* dx,
                const mh_gradients* gradients, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    need(gradients, "gradients");
    Backward b{
        .k = *k, .e = checked_experts(packed, stacked), .threads = run->threads, .hidden = hidden, .g = *gradients};
    b.s = sort_pairs(routing, b.e.num_experts);
    check_records(b.s, b.e, false);
    check_rows(x, routing->tokens, b.e.D, "x");
    check_rows(dy, routing->tokens, b.e.D, "dy");
    if (dx) check_rows(dx, routing->tokens, b.e.D, "dx");
    if (b.s.rows()) check_hidden(hidden, hidden_count, b.s.rows() * b.e.up.size.panels * 16);
    Call call(routing->tokens);
    all(b, *routing, *x, *dy, dx);
    workspaces().trim();
  });
}
