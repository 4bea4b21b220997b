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
inline void store_rounded(uint16_t* p, V x) { store_bf16(p, x); }

}  // namespace
#else
#include "vector_avx512.h"

namespace {

// Rounded to nearest even. The instructions take numbers below 2⁻¹²⁶ for zeros, as those that multiply bf16 do.
inline void store_rounded(uint16_t* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
}
inline void store_pairs(uint8_t* line, V first, V second) {  // interleaved
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
  _mm512_storeu_si512(line, _mm512_permutexvar_epi16(order, both));
}

}  // namespace
#endif
