// Threads that persist, and sleep when there is nothing to do.
#pragma once

#include <stdint.h>

namespace mh {

constexpr int64_t kMostThreads = 256;

// f(context, task, worker) for every task, on up to `threads` threads, the caller among them (worker 0). Tasks are
// taken in order from a counter. A helper that wakes too late is not waited for, so a busy machine costs no stall.
void run_tasks(int64_t threads, int64_t tasks, void (*f)(void*, int64_t, int64_t), void* context);

template <class F>
void parallel(int64_t threads, int64_t tasks, F&& f) {
  run_tasks(threads, tasks, [](void* c, int64_t task, int64_t worker) { (*static_cast<F*>(c))(task, worker); }, &f);
}

// One call at a time: held from a call's first phase to its last. Helpers spin between a call's phases and sleep
// soon after it. With many rows the threads are those of the process's OpenMP, if it has one: PyTorch's operators leave
// them spinning for milliseconds on the cores that the helpers would need. With few rows, as in decoding, they are our
// own: calls follow each other, and nobody is waited for.
constexpr int64_t kOwnRows = 32;

class Call {
 public:
  explicit Call(int64_t rows = 0);
  ~Call();
  // Between these two other calls may come, of this thread too: what lies in workspaces() is theirs.
  void leave();
  void enter();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  const int64_t rows_;
  bool inside_ = false;
};

}  // namespace mh
