#include "rotate.h"

#include <string.h>

namespace mh {

void check_norm(const mh_norm& n, int64_t width, const char* name) {
  if (n.weight && (n.width != width || (n.dtype != MH_FLOAT32 && n.dtype != MH_BF16)))
    fail(MH_BAD_ARGUMENT, "%s has %lld weights of dtype %lld, not %lld in float32 or bf16", name, (long long)n.width,
         (long long)n.dtype, (long long)width);
}

void check_rotation(const mh_rotation* r, int64_t rows, int64_t width) {
  need(r, "the rotation");
  need(r->cos, "cos");
  need(r->sin, "sin");
  if (r->width < 0 || r->width % 2 || r->width > width)
    fail(MH_BAD_ARGUMENT, "a rotation of %lld numbers of heads of %lld: an even number of them", (long long)r->width,
         (long long)width);
  if (r->norms < MH_NORM_ROW || r->norms > MH_NORM_AFTER)
    fail(MH_BAD_ARGUMENT, "a rotation: %lld is not the code of a place of norms", (long long)r->norms);
  if (r->positions != rows)
    fail(MH_BAD_ARGUMENT, "cos and sin are there for %lld positions, not for the %lld rows", (long long)r->positions,
         (long long)rows);
}

const float* norm_weight(const mh_norm& n, Workspace& workspace, const Kernels& k) {
  if (!n.weight || n.dtype == MH_FLOAT32) return static_cast<const float*>(n.weight);
  float* to = workspace.floats(n.width);
  k.widen(static_cast<const uint16_t*>(n.weight), n.width, to);
  return to;
}

void rotate(const mh_rotation& r, const float* cos, const float* sin, float* head, float* scratch) {
  const int64_t half = r.width / 2, step = r.interleave ? 2 : 1, apart = r.interleave ? 1 : half;
  memcpy(scratch, head, r.width * sizeof(float));
  for (int64_t i = 0; i < half; i++) {
    const float a = scratch[i * step], b = scratch[i * step + apart];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

void put(const Kernels& k, const float* from, int64_t width, int64_t dtype, void* to, int64_t offset) {
  if (dtype == MH_BF16)
    k.narrow(from, width, static_cast<uint16_t*>(to) + offset);
  else
    memcpy(static_cast<float*>(to) + offset, from, width * sizeof(float));
}

}  // namespace mh
