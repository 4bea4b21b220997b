// x / rms(x) · weight, row by row.
#include <string.h>

#include "common.h"
#include "pool.h"

int mh_rms_norm(const mh_norm* n, const mh_rows* x, const mh_rows* y, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    need(n, "the norm");
    need(n->weight, "the norm's weight");
    need(x, "x");
    if (n->width < 1 || (n->dtype != MH_FLOAT32 && n->dtype != MH_BF16))
      fail(MH_BAD_ARGUMENT, "a norm of width %lld and dtype %lld, not at least 1 and float32 or bf16",
           (long long)n->width, (long long)n->dtype);
    const int64_t width = n->width;
    check_rows(x, x->count, width, "x");
    check_rows(y, x->count, width, "y");
    Call call(x->count);
    const float* weight = static_cast<const float*>(n->weight);
    if (n->dtype == MH_BF16) {
      float* wide = workspaces().act.floats(width);
      k->widen(static_cast<const uint16_t*>(n->weight), width, wide);
      weight = wide;
    }
    for (int64_t i = 0; i < run->threads; i++) workspaces().worker[i].floats(width);
    constexpr int64_t block = 8;  // rows a thread is worth waking for
    parallel(run->threads, divide_up(x->count, block), [&](int64_t task, int64_t worker) {
      float* scratch = workspaces().worker[worker].floats(width);
      for (int64_t i = task * block; i < x->count && i < (task + 1) * block; i++) {
        const float* from = static_cast<const float*>(x->data) + i * x->stride;
        if (x->dtype == MH_BF16)
          k->widen(static_cast<const uint16_t*>(x->data) + i * x->stride, width, scratch), from = scratch;
        const bool is_bf16 = y->dtype == MH_BF16;
        float* to = is_bf16 ? scratch : static_cast<float*>(y->data) + i * y->stride;
        k->norm(from, width, weight, static_cast<float>(n->eps), to);
        if (is_bf16) k->narrow(to, width, static_cast<uint16_t*>(y->data) + i * y->stride);
      }
    });
    workspaces().trim();
  });
}
