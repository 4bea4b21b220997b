// Float weights to a float record, fast: what training does after each optimiser step. Rounding to integers is done
// once per model, in manyhands/quant/rounding.py.
#include <string.h>

#include "common.h"
#include "pool.h"

namespace mh {
namespace {

// Sixteen rows from `row` on as one panel; rows and inputs that do not exist are zeros.
void pack_panel(const Kernels& k, const Matrix& m, const mh_rows& from, int64_t row, int64_t rows, uint8_t* to,
                float* wide) {
  constexpr int64_t step = 64;
  const bool narrow = m.m.format == MH_BF16;
  for (int64_t k0 = 0; k0 < m.depth; k0 += step) {
    const int64_t n = m.m.inputs - k0 < step ? m.m.inputs - k0 : step;
    for (int64_t i = 0; i < 16; i++) {
      float* out = wide + i * step;
      if (i >= rows || n < step) memset(out, 0, step * sizeof(float));
      if (i >= rows || n <= 0) continue;
      const int64_t place = (row + i) * from.stride + k0;
      if (from.dtype == MH_BF16)
        k.widen(static_cast<const uint16_t*>(from.data) + place, n, out);
      else
        memcpy(out, static_cast<const float*>(from.data) + place, n * sizeof(float));
    }
    if (narrow) {
      uint16_t rounded[step], line[16][step];
      for (int64_t i = 0; i < 16; i++) {
        k.narrow(wide + i * step, step, rounded);
        memcpy(line[i], rounded, sizeof rounded);
      }
      for (int64_t j = 0; j < step; j += 2, to += 64)
        for (int64_t i = 0; i < 16; i++) memcpy(to + 4 * i, &line[i][j], 4);
    } else {
      for (int64_t j = 0; j < step; j += 16, to += 1024)
        k.transpose(wide + j, step, reinterpret_cast<float*>(to));
    }
  }
}

}  // namespace
}  // namespace mh

int mh_pack(void* record, int64_t bytes, const mh_matrix* matrix, const mh_rows* weights, const mh_rows* bias,
            const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    if (!matrix) fail(MH_BAD_ARGUMENT, "nothing to pack");
    const int64_t count = weights && weights->width > 0 ? weights->count / (matrix->parts * matrix->outputs) : 0;
    if (count < 1 || bytes % count) fail(MH_BAD_ARGUMENT, "pack: %lld bytes of records", (long long)bytes);
    const Matrix m = checked_matrix(*matrix, record, bytes, count, bytes / count, "pack");
    const int64_t N = m.m.outputs;
    if (m.m.format > MH_BF16) fail(MH_BAD_ARGUMENT, "pack: a float format is expected");
    check_rows(weights, count * m.m.parts * N, m.m.inputs, "weights");
    if ((bias != nullptr) != (m.m.bias >= 0)) fail(MH_BAD_ARGUMENT, "pack: bias");
    if (bias) check_rows(bias, count, m.m.parts * N, "bias");
    Call call;
    for (int64_t i = 0; i < run->threads; i++) workspaces().worker[i].floats(1024);
    parallel(run->threads, count * m.panels, [&](int64_t task, int64_t worker) {
      const int64_t e = task / m.panels, p = task % m.panels, part = p % m.m.parts;
      const int64_t first = p / m.m.parts * 16, rows = N - first < 16 ? N - first : 16;
      uint8_t* to = static_cast<uint8_t*>(record) + e * m.record_bytes;
      pack_panel(*k, m, *weights, (e * m.m.parts + part) * N + first, rows, to + m.m.weight + p * m.panel_bytes,
                 workspaces().worker[worker].floats(0));
      if (!bias) return;
      float* b = reinterpret_cast<float*>(to + m.m.bias) + 16 * p;
      memset(b, 0, 64);
      const int64_t place = e * bias->stride + part * N + first;
      if (bias->dtype == MH_BF16)
        k->widen(static_cast<const uint16_t*>(bias->data) + place, rows, b);
      else
        memcpy(b, static_cast<const float*>(bias->data) + place, rows * sizeof(float));
    });
  });
}
