#include "pool.h"

#include "openmp.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include <pthread.h>

namespace mh {
namespace {

constexpr auto kSpin = std::chrono::microseconds(30);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

struct Pool {
  std::mutex one_call;

  // The job: written by the caller while `ticket` is even, read by helpers that have joined an odd one.
  void (*run)(void*, int64_t, int64_t) = nullptr;
  void* context = nullptr;
  int64_t tasks = 0, helpers = 0;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> ticket{0};
  std::atomic<int64_t> inside{0};

  std::atomic<int64_t> asleep{0};
  std::mutex sleep;
  std::condition_variable wake;
  int64_t started = 0;

  void take(int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(context, task, worker);
  }

  // Joining and closing are Dekker's pattern: the helper announces itself, then looks at the ticket again; the
  // caller closes the ticket, then looks who is inside. All sequentially consistent.
  void help(int64_t worker) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = wait(seen);
      inside.fetch_add(1);
      if (ticket.load() == now && worker <= helpers) take(worker);
      inside.fetch_sub(1);
      seen = now;
    }
  }

  uint64_t wait(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (;;) {
      for (int i = 0; i < 64; i++) {
        const uint64_t now = ticket.load(std::memory_order_acquire);
        if (now != seen && now & 1) return now;
        relax();
      }
      if (std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleep);
    asleep.fetch_add(1);
    uint64_t now;
    wake.wait(lock, [&] { return (now = ticket.load()) != seen && now & 1; });
    asleep.fetch_sub(1);
    return now;
  }

  void start(int64_t count) {
    for (; started < count; started++) std::thread([this, worker = started + 1] { help(worker); }).detach();
  }
};

Pool* pool = new Pool;  // never destroyed: helpers may outlive static destructors

bool in_openmp = false;  // the current call's threads

const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // a child has none of our threads

struct Team {
  void (*f)(void*, int64_t, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0}, workers{0};
};

void join_team(void* p) {
  Team& t = *static_cast<Team*>(p);
  const int64_t worker = t.workers.fetch_add(1);
  for (int64_t task; (task = t.next.fetch_add(1, std::memory_order_relaxed)) < t.tasks;) t.f(t.context, task, worker);
}

}  // namespace

Call::Call(int64_t rows) : rows_(rows) { enter(); }
Call::~Call() {
  if (inside_) leave();
}

void Call::enter() {
  pool->one_call.lock();
  inside_ = true;
  watch_contention();
  in_openmp = rows_ > kOwnRows && openmp();
}

void Call::leave() {
  inside_ = false;
  pool->one_call.unlock();
}

void run_tasks(int64_t threads, int64_t tasks, void (*f)(void*, int64_t, int64_t), void* context) {
  Pool& p = *pool;
  const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; i++) f(context, i, 0);
    return;
  }
  if (in_openmp) {
    Team team{f, context, tasks};
    openmp()(join_team, &team, static_cast<unsigned>(helpers + 1), 0);
    return;
  }
  p.start(helpers);
  p.run = f, p.context = context, p.tasks = tasks, p.helpers = helpers;
  p.next.store(0);
  p.ticket.fetch_add(1);
  if (p.asleep.load() > 0) {
    std::lock_guard<std::mutex> lock(p.sleep);
    p.wake.notify_all();
  }
  p.take(0);
  p.ticket.fetch_add(1);
  for (int64_t spins = 0; p.inside.load() != 0; spins++) spins < 4096 ? relax() : std::this_thread::yield();
}

}  // namespace mh
