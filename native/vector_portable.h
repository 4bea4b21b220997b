// Sixteen floats in plain C++, for any CPU: what the other levels are compared with.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kTileRows = 3;
constexpr int kOuterRows = 2;
constexpr int kAttendRows = 2, kScoreTiles = 1, kMixStrip = 1;  // rows × 16 keys, × 16 numbers of values
constexpr int kSumRows = 1, kSumOutputs = 2;

typedef float Quad __attribute__((vector_size(16)));
struct V {
  Quad q[4];
};

#define MH_EACH(expression)                        \
  V r;                                             \
  for (int i = 0; i < 4; i++) r.q[i] = expression; \
  return r
#define MH_LANES(expression)                            \
  V r;                                                  \
  for (int i = 0; i < 4; i++)                           \
    for (int j = 0; j < 4; j++) r.q[i][j] = expression; \
  return r

inline V load(const float* p) {
  V r;
  memcpy(&r, p, 64);
  return r;
}
inline void store(float* p, V v) { memcpy(p, &v, 64); }
inline V set1(float x) { MH_EACH((Quad{x, x, x, x})); }
// Rounded once, as the other levels' instruction does. The product is exact in double precision; the sum is rounded to
// odd there (the last bit is set where anything is left), so that rounding it again to a float is as rounding it once.
inline float fused(float x, float y, float z) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  return __builtin_fmaf(x, y, z);
#else
  const double product = static_cast<double>(x) * y, sum = product + z, back = sum - product;
  const double left = (product - (sum - back)) + (z - back);
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if ((left < 0 || left > 0) && !(bits & 1)) bits += (left > 0) == (sum > 0) ? 1 : static_cast<uint64_t>(-1);
  double odd;
  memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
#endif
}
inline V fma(V x, V y, V z) { MH_LANES(fused(x.q[i][j], y.q[i][j], z.q[i][j])); }
inline V add(V x, V y) { MH_EACH(x.q[i] + y.q[i]); }
inline V sub(V x, V y) { MH_EACH(x.q[i] - y.q[i]); }
inline V mul(V x, V y) { MH_EACH(x.q[i] * y.q[i]); }
inline V div(V x, V y) { MH_EACH(x.q[i] / y.q[i]); }
inline V min(V limit, V x) { MH_LANES(limit.q[i][j] < x.q[i][j] ? limit.q[i][j] : x.q[i][j]); }
inline V max(V limit, V x) { MH_LANES(limit.q[i][j] > x.q[i][j] ? limit.q[i][j] : x.q[i][j]); }
inline V abs(V x) { MH_LANES(fabsf(x.q[i][j])); }
inline V where_less(V s, V limit, V x, V y) { MH_LANES(s.q[i][j] < limit.q[i][j] ? x.q[i][j] : y.q[i][j]); }
inline V round(V x) { MH_LANES(nearbyintf(x.q[i][j])); }
inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int32_t whole(float x) { return x == x ? static_cast<int32_t>(x) : 0; }  // a NaN has no integer
inline V power2(V n) { MH_LANES(from_bits(static_cast<uint32_t>(whole(n.q[i][j]) + 127) << 23)); }
inline float sum(V x) {
  const Quad s = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline V sums(const V* x) {  // lane i is sum(x[i])
  float all[16];
  for (int i = 0; i < 16; i++) all[i] = sum(x[i]);
  return load(all);
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  return from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}
inline V load_half(const uint16_t* p) { MH_LANES(half_to_float(p[4 * i + j])); }
inline V load_bf16(const uint16_t* p) { MH_LANES(from_bits(static_cast<uint32_t>(p[4 * i + j]) << 16)); }
inline void store_bf16(uint16_t* p, V x) {
  for (int i = 0; i < 16; i++) {
    uint32_t bits;
    const float lane = x.q[i / 4][i % 4];
    memcpy(&bits, &lane, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    p[i] = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
inline void load_pairs(const uint8_t* line, V& first, V& second) {
  for (int i = 0; i < 16; i++) {
    uint32_t pair;
    memcpy(&pair, line + 4 * i, 4);
    first.q[i / 4][i % 4] = from_bits(pair << 16);
    second.q[i / 4][i % 4] = from_bits(pair & 0xffff0000u);
  }
}
inline void load_quads(const uint8_t* line, V* out) {
  for (int n = 0; n < 16; n++)
    for (int i = 0; i < 4; i++) out[i].q[n / 4][n % 4] = static_cast<int8_t>(line[4 * n + i]);
}
inline void load_octets(const uint8_t* line, V* out) {
  for (int n = 0; n < 16; n++)
    for (int i = 0; i < 4; i++) {
      out[i].q[n / 4][n % 4] = static_cast<float>((line[4 * n + i] & 15) - 8);
      out[4 + i].q[n / 4][n % 4] = static_cast<float>((line[4 * n + i] >> 4) - 8);
    }
}

constexpr int kIntRows = 4;
constexpr int32_t kInt8Shift = 0;  // nothing is added to a weight of int8

struct I {
  int32_t lane[16];
};
inline I set1_int(int32_t x) {
  I r;
  for (int n = 0; n < 16; n++) r.lane[n] = x;
  return r;
}
inline V to_float(I x) { MH_LANES(static_cast<float>(x.lane[4 * i + j])); }
inline void store_int8(int8_t* p, V x) {  // whole numbers in [-128, 127]
  for (int n = 0; n < 16; n++) p[n] = static_cast<int8_t>(whole(x.q[n / 4][n % 4]));
}

inline I load_ints(const int32_t* p) {
  I r;
  memcpy(&r, p, 64);
  return r;
}

struct Quads {  // weights of four inputs by sixteen outputs
  int16_t of[64];
};
using Part = I;  // sums of int4 products over 32 inputs
inline Quads load_int8(const uint8_t* line) {
  Quads w;
  for (int n = 0; n < 64; n++) w.of[n] = static_cast<int8_t>(line[n]);
  return w;
}
inline void load_int4(const uint8_t* line, Quads& first, Quads& second) {  // the nibbles: weights + 8
  for (int n = 0; n < 64; n++) first.of[n] = line[n] & 15, second.of[n] = static_cast<int16_t>(line[n] >> 4);
}
inline I dot_int8(I c, const Quads& w, const int8_t* q) {
  for (int n = 0; n < 16; n++)
    for (int i = 0; i < 4; i++) c.lane[n] += w.of[4 * n + i] * q[i];
  return c;
}
inline Part first_part(const I& c) { return c; }
inline Part dot_int4(const Part& c, const Quads& w, const int8_t* q) { return dot_int8(c, w, q); }
inline I with_part(const I&, const Part& part) { return part; }
inline void unpack_int4(const uint8_t* line, uint8_t* to) {  // a line of nibbles to two of int8
  for (int n = 0; n < 64; n++) {
    to[n] = static_cast<uint8_t>((line[n] & 15) - 8);
    to[64 + n] = static_cast<uint8_t>((line[n] >> 4) - 8);
  }
}
inline void prefetch(const uint8_t*) {}
inline void transpose16(const float* from, int64_t stride, float* to) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j * 16 + i] = from[i * stride + j];
}

#undef MH_EACH
#undef MH_LANES

}  // namespace
