// Sixteen floats as one AVX-512 register; VNNI multiplies four inputs by sixteen outputs at once.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "transpose.h"

namespace {

constexpr int kTileRows = 14;
constexpr int kOuterRows = 8;
constexpr int kAttendRows = 6, kScoreTiles = 2, kMixStrip = 4;  // rows × 16 keys, × 16 numbers of values
constexpr int kSumRows = 4, kSumOutputs = 4;

struct V {
  __m512 v;
};

inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V fma(V x, V y, V z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline V add(V x, V y) { return {_mm512_add_ps(x.v, y.v)}; }
inline V sub(V x, V y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline V mul(V x, V y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline V div(V x, V y) { return {_mm512_div_ps(x.v, y.v)}; }
// Where x is NaN the result is NaN: the second operand is what the instruction returns.
inline V min(V limit, V x) { return {_mm512_min_ps(limit.v, x.v)}; }
inline V max(V limit, V x) { return {_mm512_max_ps(limit.v, x.v)}; }
inline V abs(V x) { return {_mm512_abs_ps(x.v)}; }
inline V where_less(V s, V limit, V x, V y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(s.v, limit.v, _CMP_LT_OQ), y.v, x.v)};
}
inline V round(V x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V power2(V n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
inline float sum(V x) {  // in the order of the other levels
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
template <int A, int B>
inline __m512 quads(__m512 x, __m512 y) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, A), _mm512_shuffle_f32x4(x, y, B));
}
template <int A, int B>
inline __m512 lanes(__m512 x, __m512 y) {
  return _mm512_add_ps(_mm512_shuffle_ps(x, y, A), _mm512_shuffle_ps(x, y, B));
}
inline __m512 fours(V a, V b, V c, V d) {  // four sums each, in a quad each
  return quads<0x88, 0xdd>(quads<0x44, 0xee>(a.v, b.v), quads<0x44, 0xee>(c.v, d.v));
}
inline V sums(const V* x) {  // lane i is sum(x[i])
  const __m512 a = fours(x[0], x[4], x[8], x[12]), b = fours(x[1], x[5], x[9], x[13]);
  const __m512 c = fours(x[2], x[6], x[10], x[14]), d = fours(x[3], x[7], x[11], x[15]);
  return {lanes<0x88, 0xdd>(lanes<0x44, 0xee>(a, b), lanes<0x44, 0xee>(c, d))};
}

inline V load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline V load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
// Round to nearest even; a NaN stays one.
inline __m512i rounded_bits(V x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i all = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), up, quiet);
  return _mm512_srli_epi32(all, 16);
}
inline void store_bf16(uint16_t* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded_bits(x)));
}
inline void load_pairs(const uint8_t* line, V& first, V& second) {
  const __m512i x = _mm512_load_si512(line);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline void unpack8(__m512i x, V* out) {
  for (int i = 0; i < 4; i++) {
    const __m512i high = _mm512_sll_epi32(x, _mm_cvtsi32_si128(24 - 8 * i));
    out[i] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24))};
  }
}
inline void load_quads(const uint8_t* line, V* out) { unpack8(_mm512_load_si512(line), out); }
inline void load_octets(const uint8_t* line, V* out) {
  const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), x = _mm512_load_si512(line);
  unpack8(_mm512_sub_epi8(_mm512_and_si512(x, low), eight), out);
  unpack8(_mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(x, 4), low), eight), out + 4);
}

constexpr int kIntRows = 12;  // 12 integer sums, 12 float ones, the weights: dpbusd keeps both its ports busy
constexpr int32_t kInt8Shift = 128;  // what is added to a weight of int8: dpbusd takes one operand without signs

struct I {  // sixteen 32-bit integers
  __m512i v;
};
inline I set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline V to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline void store_int8(int8_t* p, V x) {  // whole numbers in [-128, 127]
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

inline I load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }

using Quads = I;  // weights of four inputs by sixteen outputs as they are multiplied
using Part = I;   // sums of int4 products over 32 inputs
inline Quads load_int8(const uint8_t* line) {
  return {_mm512_xor_si512(_mm512_load_si512(line), _mm512_set1_epi8(-128))};
}
inline void load_int4(const uint8_t* line, Quads& first, Quads& second) {  // the nibbles: weights + 8
  const __m512i low = _mm512_set1_epi8(15), w = _mm512_load_si512(line);
  first = {_mm512_and_si512(w, low)}, second = {_mm512_and_si512(_mm512_srli_epi16(w, 4), low)};
}
inline I dot_int8(I c, Quads w, const int8_t* q) {
  int32_t x;
  memcpy(&x, q, 4);
  return {_mm512_dpbusd_epi32(c.v, w.v, _mm512_set1_epi32(x))};
}
inline Part first_part(I c) { return c; }
inline Part dot_int4(Part c, Quads w, const int8_t* q) { return dot_int8(c, w, q); }
inline I with_part(I, Part part) { return part; }
inline void unpack_int4(const uint8_t* line, uint8_t* to) {  // a line of nibbles to two of int8
  const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), w = _mm512_load_si512(line);
  _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(w, low), eight));
  _mm512_store_si512(to + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(w, 4), low), eight));
}
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
