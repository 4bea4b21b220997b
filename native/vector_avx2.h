// Sixteen floats as two AVX2 registers, and the integer dot products of four inputs by sixteen outputs.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "transpose.h"

namespace {

constexpr int kTileRows = 6;   // 12 accumulators, 2 of the panel, 1 of the row: 15 of 16 registers
constexpr int kOuterRows = 6;  // 6 + 6 + 4 make 16
constexpr int kAttendRows = 3, kScoreTiles = 1, kMixStrip = 2;  // rows × 16 keys, × 16 numbers of values
constexpr int kSumRows = 2, kSumOutputs = 2;

struct V {
  __m256 a, b;
};

inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
// Where x is NaN the result is NaN: the second operand is what the instruction returns.
inline V min(V limit, V x) { return {_mm256_min_ps(limit.a, x.a), _mm256_min_ps(limit.b, x.b)}; }
inline V max(V limit, V x) { return {_mm256_max_ps(limit.a, x.a), _mm256_max_ps(limit.b, x.b)}; }
inline V abs(V x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
// x where s < limit, else y
inline V where_less(V s, V limit, V x, V y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(s.a, limit.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(s.b, limit.b, _CMP_LT_OQ))};
}
inline V round(V x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
// 2^n for a whole n in [-126, 127]
inline __m256 half_power(__m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline V power2(V n) { return {half_power(n.a), half_power(n.b)}; }

inline float sum(V x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline V sums(const V* x) {  // lane i is sum(x[i])
  float all[16];
  for (int i = 0; i < 16; i++) all[i] = sum(x[i]);
  return load(all);
}

inline __m256 widen8(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline V load_bf16(const uint16_t* p) { return {widen8(p), widen8(p + 8)}; }
inline V load_half(const uint16_t* p) {
  const __m128i* h = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
// Round to nearest even; a NaN stays one.
inline __m128i narrow8(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
inline void store_bf16(uint16_t* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow8(x.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow8(x.b));
}
// A line of bf16 pairs: the first, or the second, of each of the sixteen outputs.
inline void load_pairs(const uint8_t* line, V& first, V& second) {
  const __m256i* p = reinterpret_cast<const __m256i*>(line);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i a = _mm256_load_si256(p), b = _mm256_load_si256(p + 1);
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
// A line of int8 quadruples as four vectors of floats, one per input.
inline void unpack8(__m256i a, __m256i b, V* out) {
  for (int i = 0; i < 4; i++) {
    const __m128i left = _mm_cvtsi32_si128(24 - 8 * i);
    out[i] = {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(a, left), 24)),
              _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(b, left), 24))};
  }
}
inline void load_quads(const uint8_t* line, V* out) {
  const __m256i* p = reinterpret_cast<const __m256i*>(line);
  unpack8(_mm256_load_si256(p), _mm256_load_si256(p + 1), out);
}
// A line of nibbles as eight vectors of floats.
inline void load_octets(const uint8_t* line, V* out) {
  const __m256i* p = reinterpret_cast<const __m256i*>(line);
  const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  const __m256i a = _mm256_load_si256(p), b = _mm256_load_si256(p + 1);
  unpack8(_mm256_sub_epi8(_mm256_and_si256(a, low), eight), _mm256_sub_epi8(_mm256_and_si256(b, low), eight), out);
  unpack8(_mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(a, 4), low), eight),
          _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(b, 4), low), eight), out + 4);
}

constexpr int kIntRows = 4;
constexpr int32_t kInt8Shift = 0;  // nothing is added to a weight of int8

struct I {  // sixteen 32-bit integers
  __m256i a, b;
};
inline I set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_int8(int8_t* p, V x) {  // whole numbers in [-128, 127]
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  const __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

struct Quads {  // weights of four inputs by sixteen outputs, without signs; with them where there are any
  __m256i a, b, signed_a, signed_b;
};
struct Part {  // sums of int4 products over at most 32 inputs, in 16 bits: 8 · 2 · 15 · 127 fits
  __m256i a, b;
};
inline Quads load_int8(const uint8_t* line) {
  const __m256i* p = reinterpret_cast<const __m256i*>(line);
  const __m256i a = _mm256_load_si256(p), b = _mm256_load_si256(p + 1);
  return {_mm256_abs_epi8(a), _mm256_abs_epi8(b), a, b};
}
inline void load_int4(const uint8_t* line, Quads& first, Quads& second) {  // the nibbles: weights + 8
  const __m256i* p = reinterpret_cast<const __m256i*>(line);
  const __m256i low = _mm256_set1_epi8(15), a = _mm256_load_si256(p), b = _mm256_load_si256(p + 1);
  first = {_mm256_and_si256(a, low), _mm256_and_si256(b, low), a, b};
  second = {_mm256_and_si256(_mm256_srli_epi16(a, 4), low), _mm256_and_si256(_mm256_srli_epi16(b, 4), low), a, b};
}
inline __m256i four(const int8_t* q) {
  int32_t x;
  memcpy(&x, q, 4);
  return _mm256_set1_epi32(x);
}
inline __m256i pairs_to_int(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
// |w| · (±x): x is never -128, so that two products fit in 16 bits.
inline I dot_int8(I c, const Quads& w, const int8_t* q) {
  const __m256i x = four(q);
  const __m256i a = _mm256_maddubs_epi16(w.a, _mm256_sign_epi8(x, w.signed_a));
  const __m256i b = _mm256_maddubs_epi16(w.b, _mm256_sign_epi8(x, w.signed_b));
  return {_mm256_add_epi32(c.a, pairs_to_int(a)), _mm256_add_epi32(c.b, pairs_to_int(b))};
}
inline Part first_part(I) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Part dot_int4(Part c, const Quads& w, const int8_t* q) {
  const __m256i x = four(q);
  return {_mm256_add_epi16(c.a, _mm256_maddubs_epi16(w.a, x)), _mm256_add_epi16(c.b, _mm256_maddubs_epi16(w.b, x))};
}
inline I with_part(I c, Part part) {
  return {_mm256_add_epi32(c.a, pairs_to_int(part.a)), _mm256_add_epi32(c.b, pairs_to_int(part.b))};
}
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
