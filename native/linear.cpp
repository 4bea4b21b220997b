// y = x·Wᵀ (+ b) with a packed W.
#include <string.h>

#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {
namespace {

void linear(const Kernels& k, const Matrix& m, const mh_rows& in, const mh_rows& out, int64_t threads) {
  const Floats x = as_floats(in, m.depth, rooms().x, k, threads);
  const int64_t count = in.count, blocks = divide_up(count, kBlockRows);
  const bool vector = few(count, m), rounded = out.dtype == MH_BF16;
  Quantized q;
  if (vector && is_integer(m)) {
    q.prepare(count, m, rooms().quantized[0], rooms().quantized[1]);
    for (int64_t i = 0; i < count; i++) q.set(i, x.row(i), k);
  }
  std::vector<const float*> at(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) at[i] = x.row(i);
  const int64_t most = count < kBlockRows ? count : kBlockRows;
  for (int64_t i = 0; i < threads; i++) rooms().worker[i].floats(worker_floats(most, m.depth, k));
  int64_t pieces = divide_up(8 * threads, blocks);
  pieces = pieces < m.panels ? pieces : m.panels;
  parallel(threads, blocks * pieces, [&](int64_t task, int64_t worker) {
    Worker w(rooms().worker[worker], most);
    const int64_t block = task / pieces, piece = task % pieces;
    const int64_t begin = block * count / blocks, rows = (block + 1) * count / blocks - begin;
    Rows matrix{};
    Row row[kFewIntegers];
    if (vector)
      for (int64_t i = 0; i < rows; i++) row[i] = q.view(begin + i, at[begin + i]);
    else
      matrix = matrix_rows(at.data() + begin, rows, m.depth, m.m.format, k, w.rounded);
    for (int64_t p = piece * m.panels / pieces; p < (piece + 1) * m.panels / pieces; p++) {
      const Panel panel = m.panel(0, p);
      vector ? dot_few(k, panel, row, rows, w.first) : k.product(panel, matrix, w.scratch, w.first);
      const float* bias = m.bias(0, p);
      const int64_t columns = m.outputs_of(p);
      if (bias) k.add_bias(bias, columns, rows, w.first);
      for (int64_t i = 0; i < rows; i++) {
        float* c = w.first + 16 * i;
        const int64_t place = (begin + i) * out.stride + 16 * p;
        if (rounded)
          k.narrow(c, columns, static_cast<uint16_t*>(out.data) + place);
        else
          memcpy(static_cast<float*>(out.data) + place, c, columns * sizeof(float));
      }
    }
  });
}

}  // namespace
}  // namespace mh

int mh_linear_forward(const mh_linear* l, const mh_rows* x, const mh_rows* y, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    if (!l || !x) fail(MH_BAD_ARGUMENT, "nothing to multiply");
    const Matrix m = checked_matrix(l->weight, l->record, l->bytes, 1, l->bytes / 64 * 64, "linear");
    if (m.m.parts != 1) fail(MH_BAD_ARGUMENT, "linear: %lld parts", (long long)m.m.parts);
    check_rows(x, x->count, m.m.inputs, "x");
    check_rows(y, x->count, m.m.outputs, "y");
    if (x->count == 0) return;
    Call call;
    linear(*k, m, *x, *y, run->threads);
    rooms().trim();
  });
}
