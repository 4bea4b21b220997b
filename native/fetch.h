// Experts that the caller brings into memory while a call goes on: its callbacks, called and checked.
#pragma once

#include <vector>

#include "matrix.h"
#include "pool.h"

namespace mh {

class Arrivals {  // of one call
 public:
  Arrivals(const mh_fetch* fetch, Call& call) : fetch_(fetch), call_(call) {}
  // The experts' table, as it is now and will be: the caller's own is not looked at again.
  const void* const* copy(const Experts& e);
  // Until this expert's record is in the table. Other calls may come between. Throws MH_FETCH_FAILED.
  void wait(int64_t expert);

 private:
  const mh_fetch* fetch_;
  Call& call_;
  std::vector<const void*> table_;
};

void check_fetch(const mh_fetch* fetch);

// mh_forward, which waits for experts whose record is null where there is a `fetch`.
int run_experts(const mh_experts* packed, const mh_stacked* stacked, const mh_routing* routing, const mh_rows* x,
                const mh_rows* y, float* hidden, int64_t hidden_count, const mh_fetch* fetch, const mh_run* run);

// MH_STEP_FETCH.
int begin_fetch(const mh_fetch* fetch, const mh_routing* routing, int64_t num_experts);

}  // namespace mh
