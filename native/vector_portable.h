// Sixteen floats in plain C++, for any CPU: what the other levels are compared with.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kTileRows = 3;
constexpr int kOuterRows = 2;

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
inline V fma(V x, V y, V z) { MH_EACH(x.q[i] * y.q[i] + z.q[i]); }
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

struct I {
  int32_t lane[16];
};
inline I zero_int() { return {}; }
inline V to_float(I x) { MH_LANES(static_cast<float>(x.lane[4 * i + j])); }
inline I dot_int8(I c, const uint8_t* line, const int8_t* q) {
  for (int n = 0; n < 16; n++)
    for (int i = 0; i < 4; i++) c.lane[n] += static_cast<int8_t>(line[4 * n + i]) * q[i];
  return c;
}
inline I dot_int4(I c, const uint8_t* lines, const int8_t* q) {
  for (int l = 0; l < 4; l++)
    for (int n = 0; n < 16; n++)
      for (int i = 0; i < 4; i++) {
        const int byte = lines[64 * l + 4 * n + i];
        c.lane[n] += (byte & 15) * q[8 * l + i] + (byte >> 4) * q[8 * l + 4 + i];
      }
  return c;
}
inline void prefetch(const uint8_t*) {}
inline void transpose16(const float* from, int64_t stride, float* to) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j * 16 + i] = from[i * stride + j];
}

#undef MH_EACH
#undef MH_LANES

}  // namespace
