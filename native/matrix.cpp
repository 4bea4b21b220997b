#include "matrix.h"

namespace mh {
namespace {

constexpr int64_t kLimit = 1 << 24;  // widths, as in record.py

PanelSizes panel_sizes(const mh_matrix& m) {
  const Format& f = kFormats[m.format];
  const int64_t depth = round_up(m.inputs, 64), groups = f.grouped ? depth / m.group : 1;
  return {depth, m.parts * divide_up(m.outputs, 16), 16 * depth * f.bits / 8, 16 * groups * f.scale_bytes};
}

// Of a packed matrix, before it is known to lie in any record.
void check_shape(const mh_matrix& m, const char* name) {
  if (m.outputs < 1 || m.outputs > kLimit || m.inputs < 1 || m.inputs > kLimit)
    fail(MH_BAD_ARGUMENT, "%s is a matrix of [%lld, %lld]: widths are 1 to %lld", name, (long long)m.outputs,
         (long long)m.inputs, (long long)kLimit);
  if (m.parts < 1 || m.parts > 2) fail(MH_BAD_ARGUMENT, "%s has %lld parts, not 1 or 2", name, (long long)m.parts);
  if (m.format < 0 || m.format >= MH_FORMATS || kFormats[m.format].plain)
    fail(MH_BAD_ARGUMENT, "%s: %lld is not the code of a packed format", name, (long long)m.format);
  if (kFormats[m.format].grouped && m.group != 32 && m.group != 64)
    fail(MH_BAD_ARGUMENT, "%s: %s in groups of %lld, not 32 or 64", name, kFormats[m.format].name, (long long)m.group);
}

}  // namespace

int64_t Matrix::outputs_of(int64_t p) const {
  const int64_t first = p / m.parts * 16;
  return m.outputs - first < 16 ? m.outputs - first : 16;
}

Panel Matrix::panel(const uint8_t* record, int64_t p) const {
  const int code = static_cast<int>(m.format);
  if (format().plain) {
    const int64_t row = p % m.parts * m.outputs + p / m.parts * 16;
    const uint8_t* weights = record + row * m.inputs * format().bits / 8;
    return {weights, nullptr, size.depth, 0, code, outputs_of(p), m.inputs, nullptr};
  }
  const uint8_t* scales = size.scales ? record + m.scales + p * size.scales : record;
  return {record + m.weight + p * size.weights, scales, size.depth, m.group, code, 16, size.depth, nullptr};
}

std::vector<Panel> Matrix::all_panels(int64_t expert) const {
  std::vector<Panel> all;
  all.reserve(static_cast<size_t>(size.panels));
  const uint8_t* at = record(expert);
  for (int64_t p = 0; p < size.panels; p++) all.push_back(panel(at, p));
  return all;
}

const float* Matrix::bias(int64_t expert, int64_t p) const {
  if (format().plain) {
    if (!plain_bias) return nullptr;
    return plain_bias + (expert * m.parts + p % m.parts) * m.outputs + p / m.parts * 16;
  }
  if (m.bias < 0) return nullptr;
  return reinterpret_cast<const float*>(record(expert) + m.bias) + 16 * p;
}

Matrix checked_matrix(const mh_matrix& m, int64_t record_bytes, const char* name) {
  check_shape(m, name);
  if (record_bytes < 64 || record_bytes % 64)
    fail(MH_BAD_ARGUMENT, "%s: a record of %lld bytes, not of a multiple of 64", name, (long long)record_bytes);
  const PanelSizes size = panel_sizes(m);
  const auto section = [&](int64_t at, int64_t panel_bytes, const char* what) {
    const int64_t all = size.panels * panel_bytes;
    if (at < 0 || at % 64 || all > record_bytes || at > record_bytes - all)
      fail(MH_BAD_ARGUMENT, "%s: %lld bytes of %s at %lld go beyond a record of %lld, or are not aligned to 64", name,
           (long long)all, what, (long long)at, (long long)record_bytes);
  };
  section(m.weight, size.weights, "weights");
  if (size.scales) section(m.scales, size.scales, "scales");
  if (m.bias >= 0) section(m.bias, size.bias, "bias");
  return {nullptr, nullptr, record_bytes, m, size, nullptr};
}

bool is_plain(const mh_matrix& m) { return m.format >= 0 && m.format < MH_FORMATS && kFormats[m.format].plain; }

Matrix plain_matrix(const mh_linear& l) {
  const mh_matrix& m = l.weight;
  if (m.format == MH_PLAIN_ROUNDED)
    fail(MH_BAD_ARGUMENT, "a plain linear layer is float32 or bf16, not %s", kFormats[m.format].name);
  if (m.parts != 1 || m.outputs < 1 || m.outputs > kLimit || m.inputs < 1 || m.inputs > kLimit)
    fail(MH_BAD_ARGUMENT, "a plain linear layer of [%lld, %lld] in %lld parts: widths are 1 to %lld, parts 1",
         (long long)m.outputs, (long long)m.inputs, (long long)m.parts, (long long)kLimit);
  const int64_t bytes = kFormats[m.format].bits / 8;
  if (!l.record || reinterpret_cast<uintptr_t>(l.record) % static_cast<uintptr_t>(bytes) ||
      l.bytes / bytes / m.inputs < m.outputs)
    fail(MH_BAD_ARGUMENT, "a plain linear layer of [%lld, %lld] in %lld bytes, or not aligned to its numbers",
         (long long)m.outputs, (long long)m.inputs, (long long)(l.record ? l.bytes : 0));
  return {.base = static_cast<const uint8_t*>(l.record),
          .record_bytes = l.bytes,
          .m = m,
          .size = {round_up(m.inputs, 16), divide_up(m.outputs, 16), 0, 0},
          .plain_bias = l.bias};
}

void check_activation(int64_t activation) {
  if (activation < MH_SWIGLU || activation > MH_RELU)
    fail(MH_BAD_ARGUMENT, "%lld is not the code of an activation", (long long)activation);
}

namespace {

Experts stacked_experts(const mh_stacked& s) {
  check_activation(s.activation);
  const int64_t D = s.hidden_size, F = s.expert_size, E = s.num_experts, parts = is_gated(s.activation) ? 2 : 1;
  if (D < 1 || D > kLimit || F < 1 || F > kLimit || E < 1 || E > kLimit)
    fail(MH_BAD_ARGUMENT, "%lld stacked experts of [%lld, %lld]: sizes are 1 to %lld", (long long)E, (long long)F,
         (long long)D, (long long)kLimit);
  if (s.dtype < 0 || s.dtype >= MH_FORMATS || !kFormats[s.dtype].plain)
    fail(MH_BAD_ARGUMENT, "stacked experts: %lld is not the code of a plain format", (long long)s.dtype);
  if (!s.up || !s.down) fail(MH_BAD_ARGUMENT, "stacked experts: up or down is missing");
  const auto matrix = [&](const void* data, const float* bias, int64_t N, int64_t K, int64_t part) {
    const int64_t bytes = part * N * K * kFormats[s.dtype].bits / 8;
    return Matrix{.base = static_cast<const uint8_t*>(data),
                  .record_bytes = bytes,
                  .m = {N, K, part, s.dtype, 0, 0, -1, -1},
                  .size = {round_up(K, 32), part * divide_up(N, 16), 0, 0},
                  .plain_bias = bias};
  };
  return {matrix(s.up, s.up_bias, F, D, parts), matrix(s.down, s.down_bias, D, F, 1), E, s.activation, parts, D, F};
}

}  // namespace

Experts checked_experts(const mh_experts* e, const mh_stacked* s) {
  if (!e == !s) fail(MH_BAD_ARGUMENT, "experts are either packed or stacked: one of the two pointers is null");
  if (s) return stacked_experts(*s);
  check_activation(e->activation);
  need(e->table, "the table of experts");
  if (e->num_experts < 1 || e->num_experts > kLimit)
    fail(MH_BAD_ARGUMENT, "%lld packed experts: 1 to %lld", (long long)e->num_experts, (long long)kLimit);
  const auto matrix = [&](const mh_matrix& m, const char* name) {
    Matrix made = checked_matrix(m, e->record_bytes, name);
    made.table = e->table;
    return made;
  };
  const int64_t parts = is_gated(e->activation) ? 2 : 1;
  Experts r{matrix(e->up, "up"), matrix(e->down, "down"), e->num_experts, e->activation, parts, e->up.inputs,
            e->up.outputs};
  if (r.up.m.parts != r.parts || r.down.m.parts != 1 || r.down.m.inputs != r.F || r.down.m.outputs != r.D)
    fail(MH_BAD_ARGUMENT, "up [%lld x %lld, %lld] and down [%lld, %lld] are not of one expert", (long long)e->up.parts,
         (long long)e->up.outputs, (long long)e->up.inputs, (long long)e->down.outputs, (long long)e->down.inputs);
  return r;
}

}  // namespace mh

int mh_matrix_bytes(const mh_matrix* m, int64_t* bytes) {
  using namespace mh;
  return guard([&] {
    if (!m || !bytes) fail(MH_BAD_ARGUMENT, "the matrix or the place for its sizes is missing");
    check_shape(*m, "matrix");
    const PanelSizes size = panel_sizes(*m);
    bytes[0] = size.panels * size.weights, bytes[1] = size.panels * size.scales, bytes[2] = size.panels * size.bias;
  });
}
