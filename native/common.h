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
  Workspace x, y, act, dh, dact, gathered;
  Workspace worker[257];
  Workspace quantized[4];
  void trim();
};
Workspaces& workspaces();

struct Matrix {         // a matrix per expert, packed or plain, checked
  const uint8_t* base;  // of the first expert's record, or weights
  int64_t record_bytes;
  mh_matrix m;
  int64_t depth, panels, panel_bytes, scale_bytes;
  const float* plain_bias;
  bool plain() const { return m.format >= MH_PLAIN_FLOAT32; }
  int64_t outputs_of(int64_t p) const;  // how many of a panel's 16 outputs exist
  Panel panel(int64_t expert, int64_t p) const;
  std::vector<Panel> all_panels(int64_t expert) const;
  const float* bias(int64_t expert, int64_t p) const;  // outputs_of(p) floats, or null
};

Matrix checked_matrix(const mh_matrix& m, const void* records, int64_t bytes, int64_t count, int64_t record_bytes,
                      const char* name);
void check_rows(const mh_rows* rows, int64_t count, int64_t width, const char* name);
const Kernels* checked_kernels(const mh_run* run);

struct Experts {
  Matrix up, down;
  int64_t num_experts, activation, parts, D, F;
};
Experts checked_experts(const mh_experts* e, const mh_stacked* s);

// Float32 rows with at least `width` readable columns, zero beyond the rows' own: the caller's, or a copy in
// `workspace`.
struct Floats {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};
Floats as_floats(const mh_rows& rows, int64_t width, Workspace& workspace, const Kernels& k, int64_t threads);

}  // namespace mh
