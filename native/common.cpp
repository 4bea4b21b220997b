#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <system_error>

#include "pool.h"

namespace mh {
namespace {
thread_local char message[256] = "";
constexpr int64_t kLimit = 1 << 24;         // widths, as in record.py
constexpr size_t kKept = size_t{32} << 20;  // a larger workspace is given back after the call
}  // namespace

void fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Failure{code};
}

int guarded(void (*f)(void*), void* context) {
  try {
    f(context);
    return MH_OK;
  } catch (const Failure& failure) {
    return failure.code;
  } catch (const std::bad_alloc&) {
    snprintf(message, sizeof message, "not enough memory");
    return MH_NO_MEMORY;
  } catch (const std::system_error&) {
    snprintf(message, sizeof message, "a thread could not be started");
    return MH_NO_MEMORY;
  }
}

Workspace::~Workspace() { free(data_); }

float* Workspace::floats(int64_t n) {
  const size_t bytes = static_cast<size_t>(round_up(n > 0 ? n : 1, 1024)) * sizeof(float);
  if (bytes > bytes_) {
    free(data_);
    bytes_ = 0;
    data_ = aligned_alloc(64, bytes);
    if (!data_) throw std::bad_alloc();
    bytes_ = bytes;
  }
  return static_cast<float*>(data_);
}

void Workspaces::trim() {
  for (Workspace* workspace : {&x, &y, &act, &dh, &dact, &gathered})
    if (workspace->bytes_ > kKept) {
      free(workspace->data_);
      workspace->data_ = nullptr, workspace->bytes_ = 0;
    }
}

Workspaces& workspaces() {
  static Workspaces* all = new Workspaces;
  return *all;
}

int64_t Matrix::outputs_of(int64_t p) const {
  const int64_t first = p / m.parts * 16;
  return m.outputs - first < 16 ? m.outputs - first : 16;
}

Panel Matrix::panel(int64_t expert, int64_t p) const {
  const uint8_t* record = base + expert * record_bytes;
  const int format = static_cast<int>(m.format);
  if (plain()) {
    const int64_t row = p % m.parts * m.outputs + p / m.parts * 16, size = format == MH_PLAIN_BF16 ? 2 : 4;
    return {record + row * m.inputs * size, nullptr, depth, 0, format, outputs_of(p), m.inputs, nullptr};
  }
  const uint8_t* scales = m.scales < 0 ? record : record + m.scales + p * scale_bytes;
  return {record + m.weight + p * panel_bytes, scales, depth, m.group, format, 16, depth, nullptr};
}

std::vector<Panel> Matrix::all_panels(int64_t expert) const {
  std::vector<Panel> all;
  all.reserve(static_cast<size_t>(panels));
  for (int64_t p = 0; p < panels; p++) all.push_back(panel(expert, p));
  return all;
}

const float* Matrix::bias(int64_t expert, int64_t p) const {
  if (plain()) {
    if (!plain_bias) return nullptr;
    return plain_bias + (expert * m.parts + p % m.parts) * m.outputs + p / m.parts * 16;
  }
  if (m.bias < 0) return nullptr;
  return reinterpret_cast<const float*>(base + expert * record_bytes + m.bias) + 16 * p;
}

Matrix checked_matrix(const mh_matrix& m, const void* records, int64_t bytes, int64_t count, int64_t record_bytes,
                      const char* name) {
  if (m.outputs < 1 || m.outputs > kLimit || m.inputs < 1 || m.inputs > kLimit)
    fail(MH_BAD_ARGUMENT, "%s: a matrix of [%lld, %lld]", name, (long long)m.outputs, (long long)m.inputs);
  if (m.parts < 1 || m.parts > 2) fail(MH_BAD_ARGUMENT, "%s: %lld parts", name, (long long)m.parts);
  if (m.format < MH_FLOAT32 || m.format > MH_INT4) fail(MH_BAD_ARGUMENT, "%s: format %lld", name, (long long)m.format);
  if (m.format == MH_INT4 && m.group != 32 && m.group != 64)
    fail(MH_BAD_ARGUMENT, "%s: groups of %lld", name, (long long)m.group);
  if (!records || reinterpret_cast<uintptr_t>(records) % 64) fail(MH_BAD_ARGUMENT, "%s: records not aligned", name);
  if (count < 1 || count > kLimit || record_bytes < 1 || record_bytes % 64 || bytes / record_bytes < count)
    fail(MH_BAD_ARGUMENT, "%s: %lld records of %lld bytes in %lld", name, (long long)count, (long long)record_bytes,
         (long long)bytes);
  static const int64_t bits[] = {32, 16, 8, 4};
  Matrix r{static_cast<const uint8_t*>(records),
           record_bytes,
           m,
           round_up(m.inputs, 64),
           m.parts * divide_up(m.outputs, 16),
           0,
           0,
           nullptr};
  r.panel_bytes = 2 * r.depth * bits[m.format];
  r.scale_bytes = m.format == MH_INT8 ? 64 : m.format == MH_INT4 ? 32 * (r.depth / m.group) : 0;
  const auto section = [&](int64_t at, int64_t size, const char* what) {
    if (at < 0 || at % 64 || size > record_bytes || at > record_bytes - size)
      fail(MH_BAD_ARGUMENT, "%s: %s at %lld, %lld bytes, beyond a record of %lld", name, what, (long long)at,
           (long long)size, (long long)record_bytes);
  };
  section(m.weight, r.panels * r.panel_bytes, "weights");
  if (r.scale_bytes)
    section(m.scales, r.panels * r.scale_bytes, "scales");
  else
    r.m.scales = -1;
  if (m.bias >= 0) section(m.bias, r.panels * 64, "bias");
  return r;
}

void check_rows(const mh_rows* rows, int64_t count, int64_t width, const char* name) {
  if (!rows || (!rows->data && count)) fail(MH_BAD_ARGUMENT, "%s is missing", name);
  if (rows->count != count || rows->width != width || rows->stride < width)
    fail(MH_BAD_ARGUMENT, "%s is [%lld, %lld], not [%lld, %lld]", name, (long long)rows->count, (long long)rows->width,
         (long long)count, (long long)width);
  if (rows->dtype != MH_FLOAT32 && rows->dtype != MH_BF16) fail(MH_BAD_ARGUMENT, "%s: dtype", name);
  if (reinterpret_cast<uintptr_t>(rows->data) % (rows->dtype == MH_BF16 ? 2 : 4))
    fail(MH_BAD_ARGUMENT, "%s is not aligned", name);
}

const Kernels* checked_kernels(const mh_run* run) {
  if (!run || run->threads < 1 || run->threads > kMostThreads) fail(MH_BAD_ARGUMENT, "threads: 1 to 256");
  const Kernels* k = kernels(run->level);
  if (!k) fail(MH_NO_LEVEL, "this CPU cannot run level %lld", (long long)run->level);
  return k;
}

namespace {

void check_activation(int64_t activation) {
  if (activation < MH_SWIGLU || activation > MH_RELU) fail(MH_BAD_ARGUMENT, "activation %lld", (long long)activation);
}

Experts stacked_experts(const mh_stacked& s) {
  check_activation(s.activation);
  const int64_t D = s.hidden_size, F = s.expert_size, E = s.num_experts, parts = s.activation < MH_GELU ? 2 : 1;
  if (D < 1 || D > kLimit || F < 1 || F > kLimit || E < 1 || E > kLimit || s.dtype < MH_PLAIN_FLOAT32 ||
      s.dtype > MH_PLAIN_ROUNDED || !s.up || !s.down)
    fail(MH_BAD_ARGUMENT, "stacked experts: E %lld, D %lld, F %lld, dtype %lld", (long long)E, (long long)D,
         (long long)F, (long long)s.dtype);
  const int64_t size = s.dtype == MH_PLAIN_BF16 ? 2 : 4;
  const auto matrix = [&](const void* data, const float* bias, int64_t N, int64_t K, int64_t part) {
    return Matrix{static_cast<const uint8_t*>(data),
                  part * N * K * size,
                  {N, K, part, s.dtype, 0, 0, -1, -1},
                  round_up(K, 32),
                  part * divide_up(N, 16),
                  0,
                  0,
                  bias};
  };
  return {matrix(s.up, s.up_bias, F, D, parts), matrix(s.down, s.down_bias, D, F, 1), E, s.activation, parts, D, F};
}

}  // namespace

Experts checked_experts(const mh_experts* e, const mh_stacked* s) {
  if (!e == !s) fail(MH_BAD_ARGUMENT, "experts are packed or stacked");
  if (s) return stacked_experts(*s);
  check_activation(e->activation);
  Experts r{checked_matrix(e->up, e->records, e->bytes, e->num_experts, e->record_bytes, "up"),
            checked_matrix(e->down, e->records, e->bytes, e->num_experts, e->record_bytes, "down"),
            e->num_experts,
            e->activation,
            e->activation < MH_GELU ? 2 : 1,
            e->up.inputs,
            e->up.outputs};
  if (r.up.m.parts != r.parts || r.down.m.parts != 1 || r.down.m.inputs != r.F || r.down.m.outputs != r.D)
    fail(MH_BAD_ARGUMENT, "up and down do not belong together");
  return r;
}

Floats as_floats(const mh_rows& rows, int64_t width, Workspace& workspace, const Kernels& k, int64_t threads) {
  if (rows.dtype == MH_FLOAT32 && rows.width >= width) return {static_cast<const float*>(rows.data), rows.stride};
  const int64_t stride = round_up(width, 16);
  float* to = workspace.floats(rows.count * stride);
  constexpr int64_t block = 64;
  parallel(threads, divide_up(rows.count, block), [&](int64_t task, int64_t) {
    for (int64_t i = task * block; i < rows.count && i < (task + 1) * block; i++) {
      float* row = to + i * stride;
      if (rows.dtype == MH_BF16)
        k.widen(static_cast<const uint16_t*>(rows.data) + i * rows.stride, rows.width, row);
      else
        memcpy(row, static_cast<const float*>(rows.data) + i * rows.stride, rows.width * sizeof(float));
      memset(row + rows.width, 0, (stride - rows.width) * sizeof(float));
    }
  });
  return {to, stride};
}

}  // namespace mh

const char* mh_error(void) { return mh::message; }
