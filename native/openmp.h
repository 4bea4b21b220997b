// The process's OpenMP threads: GNU's library, where something (PyTorch) has loaded it. It is never loaded here.
#pragma once

#include <stdint.h>

namespace mh {

using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);  // f, its context, the number of threads, flags

OpenMP openmp();  // null where there is none, and in a forked child

// Looks, ten times a second at most, whether the calling thread is kept waiting for a core; while it is, OpenMP's
// threads wait asleep. One caller at a time.
void watch_contention();

}  // namespace mh
