// Multi-head latent attention, absorbed: what lies between the projections and attention to the latents.
#include <string.h>

#include "cache.h"
#include "pool.h"
#include "rotate.h"

namespace mh {
namespace {

constexpr int64_t kRowsAtOnce = 48;  // a multiple of every level's kAttendRows

void check_latent(const mh_latent* l) {
  need(l, "the latent's projection");
  need(l->weight, "the latent's weight");
  if (l->dtype != MH_FLOAT32 && l->dtype != MH_BF16)
    fail(MH_BAD_ARGUMENT, "latent: %lld is not the code of float32 or bf16", (long long)l->dtype);
  const auto multiple = [](int64_t n) { return n >= 16 && n % 16 == 0; };
  if (l->heads < 1 || !multiple(l->nope) || !multiple(l->value) || !multiple(l->width) ||
      static_cast<double>(l->heads) * (static_cast<double>(l->nope) + static_cast<double>(l->value)) *
              static_cast<double>(l->width) > static_cast<double>(l->size))
    fail(MH_BAD_ARGUMENT, "latent: %lld heads of %lld and %lld numbers from a latent of %lld, in a weight of %lld",
         (long long)l->heads, (long long)l->nope, (long long)l->value, (long long)l->width, (long long)l->size);
}

// Float32 rows of `heads` heads with at least `least` numbers each; how many each has.
int64_t head_width(const mh_rows* rows, int64_t count, int64_t heads, int64_t least, const char* name) {
  need(rows, name);
  check_rows(rows, count, rows->width, name);
  if (rows->dtype != MH_FLOAT32 || rows->width % heads || rows->width / heads < least)
    fail(MH_BAD_ARGUMENT, "%s has %lld numbers in a row, not %lld heads of at least %lld in float32", name,
         (long long)rows->width, (long long)heads, (long long)least);
  return rows->width / heads;
}

float* row_of(const mh_rows& rows, int64_t i) { return static_cast<float*>(rows.data) + i * rows.stride; }

}  // namespace
}  // namespace mh

int mh_latent_products(const mh_latent* l, int64_t values, const mh_rows* x, const mh_rows* y, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    check_latent(l);
    need(x, "x");
    const int64_t from = head_width(x, x->count, l->heads, values ? l->width : l->nope, "x");
    const int64_t to = head_width(y, x->count, l->heads, values ? l->value : l->width, "y");
    const int64_t blocks = divide_up(x->count, kRowsAtOnce), size = l->dtype == MH_BF16 ? 2 : 4;
    const int64_t n = values ? l->value : l->nope, scratch = head_scratch(n, l->width);
    Call call(x->count);
    for (int64_t i = 0; i < run->threads; i++) workspaces().worker[i].floats(scratch);
    parallel(run->threads, l->heads * blocks, [&](int64_t task, int64_t worker) {
      const int64_t h = task / blocks, first = task % blocks * kRowsAtOnce;
      const int64_t at = (h * (l->nope + l->value) + (values ? l->nope : 0)) * l->width;
      const HeadRows rows{row_of(*x, first) + h * from, x->stride, row_of(*y, first) + h * to, y->stride,
                          std::min(kRowsAtOnce, x->count - first), static_cast<const char*>(l->weight) + at * size,
                          l->dtype == MH_BF16, n, l->width, workspaces().worker[worker].floats(scratch)};
      values ? k->dot_rows(rows) : k->mix_rows(rows);
    });
  });
}

int mh_latent_rope_and_cache(const mh_latent* l, const mh_rows* q, const mh_rows* kv, const mh_sequences* sequences,
                             const mh_rotation* r, const mh_cache* c, const mh_rows* placed, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    check_latent(l);
    check_cache(c);
    const int64_t rows = check_sequences(sequences, *c);
    check_rotation(r, rows, c->k_width);
    if (c->groups != 1 || c->v != c->k || c->v_block != c->k_block || c->v_row != c->k_row ||
        c->v_width != l->width || c->k_width != l->width + r->width)
      fail(MH_BAD_ARGUMENT, "cache: %lld groups of %lld numbers, not one of a latent of %lld, its own value, and %lld "
           "that are turned", (long long)c->groups, (long long)c->k_width, (long long)l->width, (long long)r->width);
    check_norm(r->k_norm, l->width, "k_norm");
    const int64_t from = head_width(q, rows, l->heads, l->nope + r->width, "q");
    const int64_t to = head_width(placed, rows, l->heads, c->k_width, "placed");
    if (from != l->nope + r->width || to != c->k_width)
      fail(MH_BAD_ARGUMENT, "q has heads of %lld numbers and placed of %lld, not of %lld and %lld", (long long)from,
           (long long)to, (long long)(l->nope + r->width), (long long)c->k_width);
    head_width(kv, rows, 1, c->k_width, "kv");
    Call call(rows);
    Workspaces& all = workspaces();
    const float* weight = norm_weight(r->k_norm, all.act, *k);
    for (int64_t i = 0; i < run->threads; i++) all.worker[i].floats(c->k_width + r->width);
    const int64_t tasks = rows < 4 ? 1 : rows, half = r->width / 2;
    parallel(run->threads, tasks, [&](int64_t task, int64_t worker) {
      float *row = all.worker[worker].floats(c->k_width + r->width), *scratch = row + c->k_width;
      for (int64_t i = task * rows / tasks; i < (task + 1) * rows / tasks; i++) {
        const float *cos = r->cos + i * half, *sin = r->sin + i * half;
        memcpy(row, row_of(*kv, i), c->k_width * sizeof(float));
        if (weight) k->norm(row, l->width, weight, static_cast<float>(r->k_norm.eps), row);
        rotate(*r, cos, sin, row + l->width, scratch);
        const int64_t s = sequence_of(*sequences, i);
        const Place at = place_of(*sequences, *c, s, sequences->first[s] + i - sequences->begin[s]);
        put(*k, row, c->k_width, c->dtype, c->k, key_at(*c, at, 0));
        for (int64_t h = 0; h < l->heads; h++) {
          float* head = row_of(*placed, i) + h * to + l->width;
          memcpy(head, row_of(*q, i) + h * from + l->nope, r->width * sizeof(float));
          rotate(*r, cos, sin, head, scratch);
        }
      }
    });
  });
}
