// A 16 by 16 transposition with AVX2, which AVX-512 uses too.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

inline void transpose8(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * stride);
  for (int i = 0; i < 4; i++) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    const __m256* u = s + 4 * i;
    r[4 * i] = _mm256_shuffle_ps(u[0], u[2], 0x44), r[4 * i + 1] = _mm256_shuffle_ps(u[0], u[2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(u[1], u[3], 0x44), r[4 * i + 3] = _mm256_shuffle_ps(u[1], u[3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(to + (4 + i) * to_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
}
inline void transpose16(const float* from, int64_t stride, float* to) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8) transpose8(from + i * stride + j, stride, to + j * 16 + i, 16);
}

}  // namespace
