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
  for (Workspace* workspace : {&x, &halves, &y, &act, &dh, &dact, &gathered})
    if (workspace->bytes_ > kKept) {
      free(workspace->data_);
      workspace->data_ = nullptr, workspace->bytes_ = 0;
    }
}

Workspaces& workspaces() {
  static Workspaces* all = new Workspaces;
  return *all;
}

void check_rows(const mh_rows* rows, int64_t count, int64_t width, const char* name) {
  if (!rows || (!rows->data && count)) fail(MH_BAD_ARGUMENT, "%s is missing", name);
  if (rows->count != count || rows->width != width || rows->stride < width)
    fail(MH_BAD_ARGUMENT, "%s is [%lld, %lld], not [%lld, %lld]", name, (long long)rows->count, (long long)rows->width,
         (long long)count, (long long)width);
  if (rows->dtype != MH_FLOAT32 && rows->dtype != MH_BF16)
    fail(MH_BAD_ARGUMENT, "%s: %lld is not the code of float32 or bf16", name, (long long)rows->dtype);
  if (reinterpret_cast<uintptr_t>(rows->data) % (rows->dtype == MH_BF16 ? 2 : 4))
    fail(MH_BAD_ARGUMENT, "%s is not aligned to its dtype", name);
}

const Kernels* checked_kernels(const mh_run* run) {
  need(run, "run");
  if (run->threads < 1 || run->threads > kMostThreads)
    fail(MH_BAD_ARGUMENT, "%lld threads: 1 to %lld", (long long)run->threads, (long long)kMostThreads);
  if (run->exact != 0 && run->exact != 1) fail(MH_BAD_ARGUMENT, "exact is %lld, not 0 or 1", (long long)run->exact);
  const Kernels* k = kernels(run->level);
  if (!k) fail(MH_NO_LEVEL, "this CPU cannot run level %lld", (long long)run->level);
  return k;
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
