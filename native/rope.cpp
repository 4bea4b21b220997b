// Projected rows become queries and keys: normed, rotated, and with the values put into the cache.
#include <string.h>

#include "cache.h"
#include "pool.h"
#include "rotate.h"

namespace mh {
namespace {

struct RowHeads {  // the heads of one row, in float32
  const Kernels& k;
  const mh_rotation& r;

  void rotate_into(const mh_rows& from, int64_t row, int64_t count, int64_t width, const mh_norm& norm,
                   const float* weight, const float* cos, const float* sin, float* to, float* scratch) const {
    if (from.dtype == MH_BF16)
      k.widen(static_cast<const uint16_t*>(from.data) + row * from.stride, from.width, to);
    else
      memcpy(to, static_cast<const float*>(from.data) + row * from.stride, from.width * sizeof(float));
    const float eps = static_cast<float>(norm.eps);
    if (weight && r.norms == MH_NORM_ROW) k.norm(to, from.width, weight, eps, to);
    for (int64_t h = 0; h < count; h++, to += width) {
      if (weight && r.norms == MH_NORM_HEAD) k.norm(to, width, weight, eps, to);
      rotate(r, cos, sin, to, scratch);
      if (weight && r.norms == MH_NORM_AFTER) k.norm(to, width, weight, eps, to);
    }
  }
};

void put_value(const Kernels& k, const mh_rows& v, int64_t from, const mh_cache& c, int64_t to) {
  if (v.dtype == c.dtype) {
    const int64_t size = v.dtype == MH_BF16 ? 2 : 4;
    memcpy(static_cast<char*>(c.v) + to * size, static_cast<const char*>(v.data) + from * size, c.v_width * size);
  } else if (v.dtype == MH_BF16) {
    k.widen(static_cast<const uint16_t*>(v.data) + from, c.v_width, static_cast<float*>(c.v) + to);
  } else {
    k.narrow(static_cast<const float*>(v.data) + from, c.v_width, static_cast<uint16_t*>(c.v) + to);
  }
}

void rope_and_cache(const Kernels& kernels, const mh_rows& q, const mh_rows& k, const mh_rows* v,
                    const mh_sequences& sequences, const mh_rotation& r, const mh_cache& c, float* out,
                    int64_t threads) {
  Workspaces& all = workspaces();
  const float* q_weight = norm_weight(r.q_norm, all.act, kernels);
  const float* k_weight = norm_weight(r.k_norm, all.dh, kernels);
  const int64_t need = std::max(q.width, k.width) + r.width, half = r.width / 2;
  for (int64_t i = 0; i < threads; i++) all.worker[i].floats(need);
  const int64_t tasks = q.count < 4 ? 1 : q.count;  // a few rows are done before anybody has woken
  parallel(threads, tasks, [&](int64_t task, int64_t worker) {
    float *row = all.worker[worker].floats(need), *scratch = row + need - r.width;
    const RowHeads heads{kernels, r};
    for (int64_t i = task * q.count / tasks; i < (task + 1) * q.count / tasks; i++) {
      const int64_t sequence = sequence_of(sequences, i);
      const Place at = place_of(sequences, c, sequence, sequences.first[sequence] + i - sequences.begin[sequence]);
      const float *cos = r.cos + i * half, *sin = r.sin + i * half;
      heads.rotate_into(q, i, q.width / c.k_width, c.k_width, r.q_norm, q_weight, cos, sin, out + i * q.width, scratch);
      heads.rotate_into(k, i, c.groups, c.k_width, r.k_norm, k_weight, cos, sin, row, scratch);
      for (int64_t g = 0; g < c.groups; g++)
        put(kernels, row + g * c.k_width, c.k_width, c.dtype, c.k, key_at(c, at, g));
      for (int64_t g = 0; g < c.groups && v; g++)
        put_value(kernels, *v, i * v->stride + g * c.v_width, c, value_at(c, at, g));
    }
  });
}

}  // namespace
}  // namespace mh

int mh_rope_and_cache(const mh_rows* q, const mh_rows* k, const mh_rows* v, const mh_sequences* sequences,
                      const mh_rotation* r, const mh_cache* c, float* out, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* kernels = checked_kernels(run);
    check_cache(c);
    need(q, "q");
    need(out, "the output");
    const int64_t rows = check_sequences(sequences, *c);
    if (rows < 1 || q->count != rows || q->width < 1 || q->width % c->k_width)
      fail(MH_BAD_ARGUMENT, "q is [%lld, %lld] for %lld rows of sequences, in heads of %lld", (long long)q->count,
           (long long)q->width, (long long)rows, (long long)c->k_width);
    check_rows(q, q->count, q->width, "q");
    check_rows(k, q->count, c->groups * c->k_width, "k");
    if (v) check_rows(v, q->count, c->groups * c->v_width, "v");
    check_rotation(r, q->count, c->k_width);
    check_norm(r->q_norm, r->norms == MH_NORM_ROW ? q->width : c->k_width, "q_norm");
    check_norm(r->k_norm, r->norms == MH_NORM_ROW ? k->width : c->k_width, "k_norm");
    Call call(q->count);
    rope_and_cache(*kernels, *q, *k, v, *sequences, *r, *c, out, run->threads);
  });
}
