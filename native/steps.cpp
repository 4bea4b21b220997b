// Many calls as one: what a decoder does for one token, without going back to the caller between its parts.
#include "fetch.h"

namespace mh {
namespace {

// All rows are float32 here, [count][width], contiguous.
float* values(const void* p, int64_t count, int64_t width, const char* name) {
  const mh_rows* rows = static_cast<const mh_rows*>(p);
  check_rows(rows, count, width, name);
  if (rows->dtype != MH_FLOAT32 || rows->stride != width)
    fail(MH_BAD_ARGUMENT, "%s is not float32 and contiguous", name);
  return static_cast<float*>(rows->data);
}

void add(const mh_step& s, const Kernels& k) {  // x += factor · y, where there is a gate g times its sigmoid
  const mh_rows* x = static_cast<const mh_rows*>(s.a[0]);
  need(x, "x");
  float* to = values(x, x->count, x->width, "x");
  const float* y = values(s.a[1], x->count, x->width, "y");
  const float* gate = s.a[2] ? values(s.a[2], x->count, 1, "gate") : nullptr;
  for (int64_t t = 0; t < x->count; t++, to += x->width, y += x->width) {
    float open = 1.0f;
    if (gate) k.scores(true, gate + t, 1, &open);
    const float factor = static_cast<float>(s.factor) * open;
    for (int64_t j = 0; j < x->width; j++) to[j] += factor * y[j];
  }
}

void activate(const mh_step& s, const Kernels& k) {  // y = act(gate) · up, or act(gate) without up
  const mh_rows* x = static_cast<const mh_rows*>(s.a[0]);
  const bool gated = is_gated(s.n[0]);
  need(x, "gate");
  if (x->width % 16)
    fail(MH_BAD_ARGUMENT, "an activation of %lld numbers in a row, not of a multiple of 16", (long long)x->width);
  check_activation(s.n[0]);
  const float* gate = values(x, x->count, x->width, "gate");
  const float* up = gated ? values(s.a[1], x->count, x->width, "up") : gate;
  float* y = values(s.a[2], x->count, x->width, "y");
  k.activate(static_cast<int>(s.n[0]), gate, up, x->count * x->width / 16, y, 16);
}

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

int one(const mh_step& s, const mh_run* run) {
  void* const* a = s.a;
  switch (s.kind) {
    case MH_STEP_NORM: return mh_rms_norm(as<mh_norm>(a[0]), as<mh_rows>(a[1]), as<mh_rows>(a[2]), run);
    case MH_STEP_LINEARS:
      return mh_linears(as<const mh_linear*>(a[0]), s.n[0], as<mh_rows>(a[1]), as<void*>(a[2]), run);
    case MH_STEP_ROPE_AND_CACHE:
      return mh_rope_and_cache(as<mh_rows>(a[0]), as<mh_rows>(a[1]), as<mh_rows>(a[2]), as<mh_sequences>(a[3]),
                               as<mh_rotation>(a[4]), as<mh_cache>(a[5]), as<float>(a[6]), run);
    case MH_STEP_ATTEND:
      return mh_attend(as<mh_attention>(a[0]), as<mh_sequences>(a[1]), as<float>(a[2]), as<mh_cache>(a[3]),
                       as<float>(a[4]), run);
    case MH_STEP_ROUTE:
      return mh_route(as<mh_router>(a[0]), as<mh_rows>(a[1]), as<float>(a[2]), as<float>(a[3]), as<int64_t>(a[4]),
                      as<float>(a[5]), run);
    case MH_STEP_EXPERTS:
      if (a[5])
        if (const int code = guard([&] { check_fetch(as<mh_fetch>(a[5])); })) return code;
      return run_experts(as<mh_experts>(a[0]), as<mh_stacked>(a[1]), as<mh_routing>(a[2]), as<mh_rows>(a[3]),
                         as<mh_rows>(a[4]), nullptr, 0, as<mh_fetch>(a[5]), run);
    case MH_STEP_FETCH: return begin_fetch(as<mh_fetch>(a[0]), as<mh_routing>(a[1]), s.n[0]);
    case MH_STEP_LATENT_PRODUCTS:
      return mh_latent_products(as<mh_latent>(a[0]), s.n[0], as<mh_rows>(a[1]), as<mh_rows>(a[2]), run);
    case MH_STEP_LATENT_ROPE_AND_CACHE:
      return mh_latent_rope_and_cache(as<mh_latent>(a[0]), as<mh_rows>(a[1]), as<mh_rows>(a[2]),
                                      as<mh_sequences>(a[3]), as<mh_rotation>(a[4]), as<mh_cache>(a[5]),
                                      as<mh_rows>(a[6]), run);
    case MH_STEP_ADD: return guard([&] { add(s, *checked_kernels(run)); });
    case MH_STEP_ACTIVATE: return guard([&] { activate(s, *checked_kernels(run)); });
    default:
      return guard([&] { fail(MH_BAD_ARGUMENT, "step %lld is not the code of a kind of step", (long long)s.kind); });
  }
}

}  // namespace
}  // namespace mh

int mh_steps(const mh_step* steps, int64_t count, const mh_run* run) {
  for (int64_t i = 0; i < count; i++)
    if (const int code = mh::one(steps[i], run)) return code;
  return MH_OK;
}
