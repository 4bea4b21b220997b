// Attention of few queries to a cache: rows are normed, rotated and put into the cache; then splits of keys are
// attended to by tasks and their results joined. Splits do not depend on the number of threads, nor does the result.
#include <math.h>
#include <string.h>

#include "common.h"
#include "pool.h"

namespace mh {
namespace {

constexpr int64_t kHeads = 4;  // that share the keys they read

void check_norm(const mh_norm& n, int64_t width, const char* name) {
  if (n.weight && (n.width != width || (n.dtype != MH_FLOAT32 && n.dtype != MH_BF16)))
    fail(MH_BAD_ARGUMENT, "%s has %lld weights of dtype %lld, not %lld in float32 or bf16", name, (long long)n.width,
         (long long)n.dtype, (long long)width);
}

void check_cache(const mh_cache* c) {
  need(c, "the cache");
  need(c->k, "the cache of keys");
  need(c->v, "the cache of values");
  if (c->k_width < 1 || c->v_width < 1 || c->k_width % 16 || c->v_width % 16)
    fail(MH_BAD_ARGUMENT, "cache: keys of %lld and values of %lld numbers are not multiples of 16",
         (long long)c->k_width, (long long)c->v_width);
  if (c->groups < 1 || c->k_row < c->k_width || c->v_row < c->v_width)
    fail(MH_BAD_ARGUMENT, "cache: %lld groups, with %lld and %lld numbers from one position to the next",
         (long long)c->groups, (long long)c->k_row, (long long)c->v_row);
  if (c->dtype != MH_FLOAT32 && c->dtype != MH_BF16)
    fail(MH_BAD_ARGUMENT, "cache: %lld is not the code of float32 or bf16", (long long)c->dtype);
}

const float* norm_weight(const mh_norm& n, Workspace& workspace, const Kernels& k) {
  if (!n.weight || n.dtype == MH_FLOAT32) return static_cast<const float*>(n.weight);
  float* to = workspace.floats(n.width);
  k.widen(static_cast<const uint16_t*>(n.weight), n.width, to);
  return to;
}

// Rotates the first `width` numbers of a head; the two of a pair come out half of `width` apart.
void rotate(const mh_rotation& r, const float* cos, const float* sin, float* head, float* scratch) {
  const int64_t half = r.width / 2, step = r.interleave ? 2 : 1, apart = r.interleave ? 1 : half;
  memcpy(scratch, head, r.width * sizeof(float));
  for (int64_t i = 0; i < half; i++) {
    const float a = scratch[i * step], b = scratch[i * step + apart];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

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

void put(const Kernels& k, const float* from, int64_t width, int64_t dtype, void* to, int64_t offset) {
  if (dtype == MH_BF16)
    k.narrow(from, width, static_cast<uint16_t*>(to) + offset);
  else
    memcpy(static_cast<float*>(to) + offset, from, width * sizeof(float));
}

void rope_and_cache(const Kernels& kernels, const mh_rows& q, const mh_rows& k, const mh_rows& v, int64_t batch,
                    int64_t first, const mh_rotation& r, const mh_cache& c, float* out, int64_t threads) {
  Workspaces& all = workspaces();
  const float* q_weight = norm_weight(r.q_norm, all.act, kernels);
  const float* k_weight = norm_weight(r.k_norm, all.dh, kernels);
  const int64_t queries = q.count / batch, widest = q.width > k.width ? q.width : k.width;
  const int64_t need = (widest > v.width ? widest : v.width) + r.width;
  for (int64_t i = 0; i < threads; i++) all.worker[i].floats(need);
  const int64_t tasks = q.count < 4 ? 1 : q.count;  // a few rows are done before anybody has woken
  parallel(threads, tasks, [&](int64_t task, int64_t worker) {
    float *row = all.worker[worker].floats(need), *scratch = row + need - r.width;
    const RowHeads heads{kernels, r};
    for (int64_t i = task * q.count / tasks; i < (task + 1) * q.count / tasks; i++) {
      const int64_t b = i / queries, s = i % queries, at = first + s, half = r.width / 2;
      const int64_t table = (r.positions == queries ? s : i) * half;
      const float *cos = r.cos + table, *sin = r.sin + table;
      heads.rotate_into(q, i, q.width / c.k_width, c.k_width, r.q_norm, q_weight, cos, sin, out + i * q.width, scratch);
      heads.rotate_into(k, i, c.groups, c.k_width, r.k_norm, k_weight, cos, sin, row, scratch);
      for (int64_t g = 0; g < c.groups; g++)
        put(kernels, row + g * c.k_width, c.k_width, c.dtype, c.k, b * c.k_batch + g * c.k_group + at * c.k_row);
      for (int64_t g = 0; g < c.groups; g++) {
        const int64_t from = i * v.stride + g * c.v_width, to = b * c.v_batch + g * c.v_group + at * c.v_row;
        if (v.dtype == c.dtype) {
          const int64_t size = v.dtype == MH_BF16 ? 2 : 4;
          memcpy(static_cast<char*>(c.v) + to * size, static_cast<const char*>(v.data) + from * size, c.v_width * size);
        } else if (v.dtype == MH_BF16) {
          kernels.widen(static_cast<const uint16_t*>(v.data) + from, c.v_width, static_cast<float*>(c.v) + to);
        } else {
          kernels.narrow(static_cast<const float*>(v.data) + from, c.v_width, static_cast<uint16_t*>(c.v) + to);
        }
      }
    }
  });
}

struct Attend {
  const Kernels& k;
  const mh_attention& a;
  const mh_cache& c;
  const float* q;
  float* y;
  int64_t threads;

  void all() {
    const int64_t per_group = a.heads / c.groups, blocks = divide_up(per_group, kHeads);
    const int64_t splits = divide_up(a.length, kSplitKeys), rows = a.batch * a.queries * a.heads;
    float* parts = workspaces().act.floats(rows * splits * (c.v_width + 2));
    float *largest = parts + rows * splits * c.v_width, *total = largest + rows * splits;
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(kHeads * kSplitKeys);
    const int64_t size = c.dtype == MH_BF16 ? 2 : 4;
    parallel(threads, a.batch * a.queries * c.groups * blocks * splits, [&](int64_t task, int64_t worker) {
      const int64_t split = task % splits, block = task / splits % blocks;
      const int64_t g = task / splits / blocks % c.groups, row = task / splits / blocks / c.groups;
      const int64_t b = row / a.queries, s = row % a.queries, first = split * kSplitKeys;
      const int64_t seen = a.length - a.queries + s + 1;
      const int64_t head = g * per_group + block * kHeads, left = per_group - block * kHeads;
      const int64_t heads = left < kHeads ? left : kHeads;
      const int64_t keys = seen - first < kSplitKeys ? seen - first : kSplitKeys;
      const int64_t at = (row * splits + split) * a.heads + head;
      float* out = parts + at * c.v_width;
      if (keys <= 0) {
        for (int64_t h = 0; h < heads; h++) largest[at + h] = -INFINITY, total[at + h] = 0;
        memset(out, 0, heads * c.v_width * sizeof(float));
        return;
      }
      const char* keys_at = static_cast<const char*>(c.k) + (b * c.k_batch + g * c.k_group + first * c.k_row) * size;
      const char* values_at = static_cast<const char*>(c.v) + (b * c.v_batch + g * c.v_group + first * c.v_row) * size;
      const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + s * a.mask_query + first : nullptr;
      k.attend({q + (row * a.heads + head) * c.k_width, c.k_width, heads, keys_at, values_at, c.dtype == MH_BF16,
                c.k_row, c.v_row, keys, c.k_width, c.v_width, mask, static_cast<float>(a.scale),
                static_cast<float>(a.cap), workspaces().worker[worker].floats(kHeads * kSplitKeys), largest + at,
                total + at, out, c.v_width});
    });
    const int64_t tasks = splits > 8 ? rows : 1;
    parallel(threads, tasks, [&](int64_t task, int64_t) {
      for (int64_t i = task * rows / tasks; i < (task + 1) * rows / tasks; i++)
        join(i / a.heads, i % a.heads, splits, parts, largest, total, y + i * c.v_width);
    });
  }

  void join(int64_t row, int64_t head, int64_t splits, const float* parts, const float* largest, const float* total,
            float* to) const {
    const int64_t first = row * splits * a.heads + head;
    float most = a.sinks ? a.sinks[head] : -INFINITY;
    for (int64_t i = 0; i < splits; i++) {
      const float l = largest[first + i * a.heads];
      most = l > most || l != l ? l : most;
    }
    float sum = a.sinks ? expf(a.sinks[head] - most) : 0;
    memset(to, 0, c.v_width * sizeof(float));
    for (int64_t i = 0; i < splits; i++) {
      const int64_t at = first + i * a.heads;
      if (largest[at] == -INFINITY) continue;  // nobody is seen there
      const float weight = expf(largest[at] - most), *part = parts + at * c.v_width;
      sum += weight * total[at];
      for (int64_t j = 0; j < c.v_width; j++) to[j] += weight * part[j];
    }
    for (int64_t j = 0; j < c.v_width; j++) to[j] /= sum;
  }
};

// The numbers that `length` positions reach; in double, where nothing overflows.
double reach(double batch, double groups, double length, int64_t width, const int64_t (&strides)[3]) {
  double all = static_cast<double>(width);
  const double last[] = {batch - 1, groups - 1, length - 1};
  for (int i = 0; i < 3; i++) all += last[i] * static_cast<double>(strides[i]);
  return all;
}

void check_positions(const mh_cache& c, int64_t batch, int64_t length) {
  const auto to_double = [](int64_t n) { return static_cast<double>(n); };
  const double b = to_double(batch), g = to_double(c.groups), l = to_double(length);
  if (length < 1 || c.k_batch < 0 || c.k_group < 0 || c.v_batch < 0 || c.v_group < 0 ||
      reach(b, g, l, c.k_width, {c.k_batch, c.k_group, c.k_row}) > to_double(c.k_size) ||
      reach(b, g, l, c.v_width, {c.v_batch, c.v_group, c.v_row}) > to_double(c.v_size))
    fail(MH_BAD_ARGUMENT, "cache: there is no room for %lld positions", (long long)length);
}

}  // namespace
}  // namespace mh

int mh_rope_and_cache(const mh_rows* q, const mh_rows* k, const mh_rows* v, int64_t batch, int64_t first,
                      const mh_rotation* r, const mh_cache* c, float* out, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* kernels = checked_kernels(run);
    check_cache(c);
    need(q, "q");
    need(r, "the rotation");
    need(out, "the output");
    if (batch < 1 || q->count < 1 || q->count % batch || q->width < 1 || q->width % c->k_width || first < 0)
      fail(MH_BAD_ARGUMENT, "q is [%lld, %lld] for %lld sequences from position %lld on, in heads of %lld",
           (long long)q->count, (long long)q->width, (long long)batch, (long long)first, (long long)c->k_width);
    check_rows(q, q->count, q->width, "q");
    check_rows(k, q->count, c->groups * c->k_width, "k");
    check_rows(v, q->count, c->groups * c->v_width, "v");
    const int64_t queries = q->count / batch;
    check_positions(*c, batch, first + queries);
    need(r->cos, "cos");
    need(r->sin, "sin");
    if (r->width < 0 || r->width % 2 || r->width > c->k_width)
      fail(MH_BAD_ARGUMENT, "a rotation of %lld numbers of heads of %lld: an even number of them", (long long)r->width,
           (long long)c->k_width);
    if (r->positions != queries && r->positions != q->count)
      fail(MH_BAD_ARGUMENT, "cos and sin are there for %lld positions, not for %lld or %lld", (long long)r->positions,
           (long long)queries, (long long)q->count);
    check_norm(r->q_norm, r->norms == MH_NORM_ROW ? q->width : c->k_width, "q_norm");
    check_norm(r->k_norm, r->norms == MH_NORM_ROW ? k->width : c->k_width, "k_norm");
    Call call;
    rope_and_cache(*kernels, *q, *k, *v, batch, first, *r, *c, out, run->threads);
  });
}

int mh_attend(const mh_attention* a, const float* q, const mh_cache* c, float* y, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* kernels = checked_kernels(run);
    check_cache(c);
    need(a, "the attention");
    need(q, "q");
    need(y, "y");
    if (a->batch < 1 || a->queries < 1 || a->queries > a->length)
      fail(MH_BAD_ARGUMENT, "attention of %lld sequences, %lld queries each, to %lld positions", (long long)a->batch,
           (long long)a->queries, (long long)a->length);
    if (a->heads < 1 || a->heads % c->groups)
      fail(MH_BAD_ARGUMENT, "%lld heads are not a multiple of %lld groups of keys and values", (long long)a->heads,
           (long long)c->groups);
    check_positions(*c, a->batch, a->length);
    Call call;
    Attend{*kernels, *a, *c, q, y, run->threads}.all();
    workspaces().trim();
  });
}
