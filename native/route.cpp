// The router: logits, scores, the best experts, their weights. Its rules: manyhands/moe/router.py.
#include <math.h>

#include <vector>

#include "pool.h"
#include "sorted.h"

namespace mh {
namespace {

constexpr int64_t kMost = 1 << 24;  // as matrices' widths

// NaN before everything, and of equals the first.
inline bool better(float a, float b) { return a > b || (a != a && b == b); }

// The `count` best of `n`, best first.
void best(const float* x, int64_t n, int64_t count, int64_t* out) {
  int64_t held = 0;
  for (int64_t j = 0; j < n; j++) {
    if (held == count && !better(x[j], x[out[count - 1]])) continue;
    int64_t i = held < count ? held++ : count - 1;
    for (; i > 0 && better(x[j], x[out[i - 1]]); i--) out[i] = out[i - 1];
    out[i] = j;
  }
}

struct Route {
  const mh_router& r;
  std::vector<float> choice, group_scores;
  std::vector<char> allowed;
  std::vector<int64_t> chosen;

  void limit() {  // every expert outside the best groups is at -inf
    const int64_t size = r.experts / r.groups, counted = size < r.best_of_group ? size : r.best_of_group;
    group_scores.assign(static_cast<size_t>(r.groups), 0);
    chosen.resize(static_cast<size_t>(size > r.groups ? size : r.groups));
    for (int64_t g = 0; g < r.groups; g++) {
      best(choice.data() + g * size, size, counted, chosen.data());
      for (int64_t i = 0; i < counted; i++) group_scores[g] += choice[g * size + chosen[i]];
    }
    best(group_scores.data(), r.groups, r.topk_group, chosen.data());
    allowed.assign(static_cast<size_t>(r.groups), 0);
    for (int64_t i = 0; i < r.topk_group; i++) allowed[chosen[i]] = 1;
    for (int64_t e = 0; e < r.experts; e++)
      if (!allowed[e / size]) choice[e] = -INFINITY;
  }

  void token(const float* scores, int64_t* ids, float* weights) {
    choice.assign(scores, scores + r.experts);
    for (int64_t e = 0; r.choice_bias && e < r.experts; e++) choice[e] += r.choice_bias[e];
    if (r.groups > 1) limit();
    best(choice.data(), r.experts, r.per_token, ids);
    float sum = 0;
    for (int64_t k = 0; k < r.per_token; k++) sum += weights[k] = scores[ids[k]];
    const float scaling = static_cast<float>(r.scaling);
    for (int64_t k = 0; k < r.per_token; k++)
      weights[k] = (r.renormalise ? weights[k] / (sum + 1e-20f) : weights[k]) * scaling;
  }
};

// By the tiles of plain linear layers: a token's logits are the same alone and among others.
void logits_of(const mh_router& r, const mh_rows& x, float* logits, const Kernels& k, int64_t threads) {
  const int64_t panels = divide_up(r.experts, 16), depth = round_up(r.width, 16);
  const int64_t blocks = divide_up(x.count, kBlockRows), most = x.count < kBlockRows ? x.count : kBlockRows;
  const Floats rows = as_floats(x, depth, workspaces().x, k, threads);
  std::vector<const float*> at(static_cast<size_t>(x.count));
  for (int64_t t = 0; t < x.count; t++) at[t] = rows.row(t);
  for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats((256 + 16) * most + kScratch);
  parallel(threads, blocks * panels, [&](int64_t task, int64_t worker) {
    const int64_t block = task / panels, first = task % panels * 16, left = r.experts - first;
    const int64_t begin = block * x.count / blocks, end = (block + 1) * x.count / blocks, count = left < 16 ? left : 16;
    float *scratch = workspaces().worker[worker].floats(0), *c = scratch + kScratch + 256 * most;
    const Panel panel{reinterpret_cast<const uint8_t*>(r.weight + first * r.width), nullptr, depth, 0,
                      MH_PLAIN_FLOAT32, count, r.width, nullptr};
    k.gemm_plain(panel, at.data() + begin, end - begin, scratch, c);
    for (int64_t t = begin; t < end; t++, c += 16)
      for (int64_t e = 0; e < count; e++)
        logits[t * r.experts + first + e] = c[e] + (r.logit_bias ? r.logit_bias[first + e] : 0.0f);
  });
}

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
    if (r->experts < 1 || r->experts > kMost || r->width < 1 || r->width > kMost || r->per_token < 1 ||
        r->per_token > r->experts)
      fail(MH_BAD_ARGUMENT, "a router of %lld experts, %lld per token, for tokens of width %lld", (long long)r->experts,
           (long long)r->per_token, (long long)r->width);
    if (r->groups < 0 || (r->groups > 1 && (r->experts % r->groups || r->topk_group < 1 || r->topk_group > r->groups ||
                                            r->best_of_group < 1)))
      fail(MH_BAD_ARGUMENT, "a router of %lld experts in %lld groups, of which it takes %lld by their best %lld",
           (long long)r->experts, (long long)r->groups, (long long)r->topk_group, (long long)r->best_of_group);
    check_rows(x, x->count, r->width, "x");
    Call call(x->count);
    logits_of(*r, *x, logits, *k, run->threads);
    constexpr int64_t block = 8;  // tokens a thread is worth waking for
    parallel(run->threads, divide_up(x->count, block), [&](int64_t task, int64_t) {
      Route route{*r, {}, {}, {}, {}};
      for (int64_t t = task * block; t < x->count && t < (task + 1) * block; t++) {
        k->scores(r->sigmoid != 0, logits + t * r->experts, r->experts, scores + t * r->experts);
        route.token(scores + t * r->experts, ids + t * r->per_token, weights + t * r->per_token);
      }
    });
    workspaces().trim();
  });
}
