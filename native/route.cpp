// The router for few tokens: logits, scores, the best experts, their weights. Its rules: manyhands/moe/router.py.
#include <math.h>
#include <string.h>

#include <vector>

#include "common.h"
#include "pool.h"

namespace mh {
namespace {

// NaN before everything, and of equals the first.
inline bool better(float a, float b) { return a > b || (a != a && b == b); }

// The `count` best of `n`, best first; `taken` is scratch.
void best(const float* x, int64_t n, int64_t count, std::vector<char>& taken, int64_t* out) {
  taken.assign(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < count; i++) {
    int64_t at = -1;
    for (int64_t j = 0; j < n; j++)
      if (!taken[j] && (at < 0 || better(x[j], x[at]))) at = j;
    taken[at] = 1;
    out[i] = at;
  }
}

struct Route {
  const mh_router& r;
  std::vector<float> choice, group_scores;
  std::vector<char> taken, allowed;
  std::vector<int64_t> chosen;

  void scores_of(const float* logits, float* scores) const {
    if (r.sigmoid) {
      for (int64_t e = 0; e < r.experts; e++) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
      return;
    }
    float most = logits[0], sum = 0;
    for (int64_t e = 1; e < r.experts; e++) most = better(logits[e], most) ? logits[e] : most;
    for (int64_t e = 0; e < r.experts; e++) sum += scores[e] = expf(logits[e] - most);
    for (int64_t e = 0; e < r.experts; e++) scores[e] /= sum;
  }

  void limit() {  // every expert outside the best groups is at -inf
    const int64_t size = r.experts / r.groups, counted = size < r.best_of_group ? size : r.best_of_group;
    group_scores.assign(static_cast<size_t>(r.groups), 0);
    chosen.resize(static_cast<size_t>(size > r.groups ? size : r.groups));
    for (int64_t g = 0; g < r.groups; g++) {
      best(choice.data() + g * size, size, counted, taken, chosen.data());
      for (int64_t i = 0; i < counted; i++) group_scores[g] += choice[g * size + chosen[i]];
    }
    best(group_scores.data(), r.groups, r.topk_group, taken, chosen.data());
    allowed.assign(static_cast<size_t>(r.groups), 0);
    for (int64_t i = 0; i < r.topk_group; i++) allowed[chosen[i]] = 1;
    for (int64_t e = 0; e < r.experts; e++)
      if (!allowed[e / size]) choice[e] = -INFINITY;
  }

  void token(const float* scores, int64_t* ids, float* weights) {
    choice.assign(scores, scores + r.experts);
    for (int64_t e = 0; r.choice_bias && e < r.experts; e++) choice[e] += r.choice_bias[e];
    if (r.groups > 1) limit();
    best(choice.data(), r.experts, r.per_token, taken, ids);
    float sum = 0;
    for (int64_t k = 0; k < r.per_token; k++) sum += weights[k] = scores[ids[k]];
    const float scaling = static_cast<float>(r.scaling);
    for (int64_t k = 0; k < r.per_token; k++)
      weights[k] = (r.renormalise ? weights[k] / (sum + 1e-20f) : weights[k]) * scaling;
  }
};

}  // namespace
}  // namespace mh

int mh_route(const mh_router* r, const mh_rows* x, float* logits, float* scores, int64_t* ids, float* weights,
             const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    need(r, "the router");
    need(r->weight, "the router's weight");
    need(x, "x");
    need(logits, "logits");
    need(scores, "scores");
    need(ids, "expert ids");
    need(weights, "weights");
    if (r->experts < 1 || r->per_token < 1 || r->per_token > r->experts)
      fail(MH_BAD_ARGUMENT, "a router of %lld experts, %lld per token", (long long)r->experts, (long long)r->per_token);
    if (r->width < 16 || r->width % 16)
      fail(MH_BAD_ARGUMENT, "a router of width %lld, not a multiple of 16", (long long)r->width);
    if (r->groups < 0 || (r->groups > 1 && (r->experts % r->groups || r->topk_group < 1 || r->topk_group > r->groups ||
                                            r->best_of_group < 1)))
      fail(MH_BAD_ARGUMENT, "a router of %lld experts in %lld groups, of which it takes %lld by their best %lld",
           (long long)r->experts, (long long)r->groups, (long long)r->topk_group, (long long)r->best_of_group);
    check_rows(x, x->count, r->width, "x");
    Call call;
    const Floats rows = as_floats(*x, r->width, workspaces().x, *k, run->threads);
    const int64_t pieces = divide_up(r->experts, 16);
    parallel(run->threads, x->count * pieces, [&](int64_t task, int64_t) {
      const int64_t t = task / pieces, first = task % pieces * 16, left = r->experts - first;
      float* to = logits + t * r->experts + first;
      const int64_t count = left < 16 ? left : 16;
      k->gemv(rows.row(t), r->weight + first * r->width, false, count, r->width, to);
      for (int64_t e = 0; r->logit_bias && e < count; e++) to[e] += r->logit_bias[first + e];
    });
    Route route{*r, {}, {}, {}, {}, {}};
    for (int64_t t = 0; t < x->count; t++) {
      route.scores_of(logits + t * r->experts, scores + t * r->experts);
      route.token(scores + t * r->experts, ids + t * r->per_token, weights + t * r->per_token);
    }
    workspaces().trim();
  });
}
