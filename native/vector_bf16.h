// The vectors of the levels that multiply bf16: AVX-512's, or with MH_EMULATE plain C++, so that what is built on them
// can be tested on any CPU.
#pragma once

#if defined(MH_EMULATE)
#include "vector_portable.h"

namespace {

inline void store_pairs(uint8_t* line, V first, V second) {
  uint16_t a[16], b[16];
  store_bf16(a, first), store_bf16(b, second);
  for (int i = 0; i < 16; i++) memcpy(line + 4 * i, a + i, 2), memcpy(line + 4 * i + 2, b + i, 2);
}

}  // namespace
#else
#include "vector_avx512.h"
#endif
