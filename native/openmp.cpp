// A thread of GNU's OpenMP that waits at a barrier spins for milliseconds. Alone that is the fastest; beside a process
// that needs the cores it holds the very core that the thread it waits for has been taken off, and a training step
// takes several times as long. The library spins for an instant only while it manages more threads than there are
// processors (libgomp's do_spin). So as long as the calling thread is kept waiting for a core, we keep a team of
// threads that does nothing and sleeps. No arithmetic changes: results are the same bits, whoever else is there.
#include "openmp.h"

#include "manyhands.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

namespace mh {
namespace {

constexpr auto kEvery = std::chrono::milliseconds(100);
constexpr int64_t kLeast = 10'000'000;  // ns of work and waiting: less says nothing
constexpr int kCalm = 5;                // looks without waiting until the team is stopped

struct SleepingTeam {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t now = 0;
  bool running = false;

  void start() {
    std::lock_guard<std::mutex> lock(mutex);
    running = true;
    std::thread([this, mine = ++now] {
      openmp()([](void*) {}, nullptr, std::thread::hardware_concurrency() + 1, 0);
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [&] { return now != mine; });  // the library lets the team go when this thread ends
    }).detach();
  }

  void stop() {
    std::lock_guard<std::mutex> lock(mutex);
    running = false;
    now++;
    changed.notify_all();
  }
};

struct Watch {
  SleepingTeam* team = new SleepingTeam;  // never destroyed: its thread may outlive static destructors
  int calm = 0;

  // `waited` and `ran`: nanoseconds since the last look that the thread wanted a core and had one.
  bool judge(int64_t waited, int64_t ran) {
    const int64_t all = waited + ran;
    if (all < kLeast || !openmp()) return team->running;
    calm = waited * 100 > all ? 0 : calm + 1;
    try {
      if (!team->running && waited * 20 > all) team->start();
      if (team->running && calm >= kCalm) team->stop();
    } catch (const std::system_error&) {  // no thread could be started: it stays as slow as it was
      team->stop();
    }
    return team->running;
  }
};

Watch* watch = new Watch;

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { watch = new Watch, forked = true; });

// What the kernel counts for this thread: nanoseconds on a core and waiting for one.
bool seen(int64_t* ran, int64_t* waited) {
  const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char text[96];
  const ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  if (size <= 0) return false;
  text[size] = 0;
  long long on, off;
  if (sscanf(text, "%lld %lld", &on, &off) != 2) return false;
  *ran = on, *waited = off;
  return true;
}

}  // namespace

// A forked child has none of the parent's threads, and the library would wait for them.
OpenMP openmp() {
  static const OpenMP found = [] {
    void* library = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<OpenMP>(library ? dlsym(library, "GOMP_parallel") : nullptr);
  }();
  return forked ? nullptr : found;
}

void watch_contention() {
  static thread_local std::chrono::steady_clock::time_point last{};
  static thread_local int64_t ran = 0, waited = 0;
  const auto now = std::chrono::steady_clock::now();
  if (now - last < kEvery) return;
  const bool first = last.time_since_epoch().count() == 0;
  last = now;
  const int64_t ran_before = ran, waited_before = waited;
  if (seen(&ran, &waited) && !first) watch->judge(waited - waited_before, ran - ran_before);
}

}  // namespace mh

int64_t mh_contention(int64_t waited, int64_t ran) { return mh::watch->judge(waited, ran); }
