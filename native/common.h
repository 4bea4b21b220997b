// Shared by the calls: errors, scratch memory, checked views of what the caller gave.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "manyhands.h"

namespace mh {

struct Failure {  // thrown inside, a code at the boundary
  int code;
};
[[noreturn]] void fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
inline void need(const void* p, const char* name) {
  if (!p) fail(MH_BAD_ARGUMENT, "%s is missing", name);
}
int guarded(void (*f)(void*), void* context);  // runs f; turns what it throws into a code

template <class F>
int guard(F&& f) {
  return guarded([](void* c) { (*static_cast<F*>(c))(); }, &f);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// 64-byte aligned memory that grows and is kept between calls, unless it is large.
class Workspace {
 public:
  float* floats(int64_t n);
  ~Workspace();

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  friend struct Workspaces;
};

struct Workspaces {  // used by one call at a time
  Workspace x, halves, y, act, dh, dact, gathered;
  Workspace worker[257];
  Workspace integers[5];
  void trim();
};
Workspaces& workspaces();

void check_rows(const mh_rows* rows, int64_t count, int64_t width, const char* name);
const Kernels* checked_kernels(const mh_run* run);

// Float32 rows with at least `width` readable columns, zero beyond the rows' own: the caller's, or a copy in
// `workspace`.
struct Floats {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};
Floats as_floats(const mh_rows& rows, int64_t width, Workspace& workspace, const Kernels& k, int64_t threads);

}  // namespace mh
