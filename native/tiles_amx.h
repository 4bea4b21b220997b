// The tile instructions in use: 16 rows of 64 bytes each. A tile's number is part of the instruction. With MH_EMULATE
// they are written out in C++, so that what is built on them can be tested on any CPU.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(MH_EMULATE)

namespace {

struct Tile {
  uint8_t row[16][64];
};
thread_local Tile tile_file[8];
thread_local int tile_rows[8], tile_bytes[8];

struct TileScope {  // a narrow tile has 32 bytes in a row, a short one 8 rows
  explicit TileScope(int narrow = -1, int short_one = -1) {
    for (int i = 0; i < 8; i++) tile_rows[i] = i == short_one ? 8 : 16, tile_bytes[i] = i == narrow ? 32 : 64;
  }
};
template <int T>
inline void tile_zero() {
  memset(&tile_file[T], 0, sizeof(Tile));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  memset(&tile_file[T], 0, sizeof(Tile));
  for (int i = 0; i < tile_rows[T]; i++)
    memcpy(tile_file[T].row[i], static_cast<const uint8_t*>(p) + i * stride, tile_bytes[T]);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < tile_rows[T]; i++)
    memcpy(static_cast<uint8_t*>(p) + i * stride, tile_file[T].row[i], tile_bytes[T]);
}
template <int C, int A, int B>
inline void tile_multiply_int8() {  // what a smaller tile does not have is zero
  for (int i = 0; i < 16; i++)
    for (int n = 0; n < 16; n++) {
      int32_t c;
      memcpy(&c, tile_file[C].row[i] + 4 * n, 4);
      for (int k = 0; k < 64; k++)
        c += static_cast<int8_t>(tile_file[A].row[i][k]) * static_cast<int8_t>(tile_file[B].row[k / 4][4 * n + k % 4]);
      memcpy(tile_file[C].row[i] + 4 * n, &c, 4);
    }
}
inline float tile_bf16(const uint8_t* p) {
  const uint8_t bytes[4] = {0, 0, p[0], p[1]};
  float x;
  memcpy(&x, bytes, 4);
  return x;
}
template <int C, int A, int B>
inline void tile_multiply() {
  for (int i = 0; i < 16; i++)
    for (int n = 0; n < 16; n++) {
      float c;
      memcpy(&c, tile_file[C].row[i] + 4 * n, 4);
      for (int k = 0; k < 32; k++)
        c += tile_bf16(tile_file[A].row[i] + 2 * k) * tile_bf16(tile_file[B].row[k / 2] + 4 * n + 2 * (k % 2));
      memcpy(tile_file[C].row[i] + 4 * n, &c, 4);
    }
}

}  // namespace

#else

namespace {

// Written as assembly: gcc 12's intrinsics take a tile's number as text, not as a constant, and do not say that the
// configuration is read.
struct TileScope {  // the configuration belongs to the thread
  explicit TileScope(int narrow = -1, int short_one = -1) {  // a tile with 32 bytes in a row, one with 8 rows
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = i == narrow ? 32 : 64, config.rows[i] = i == short_one ? 8 : 16;
    __asm__ volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  }
  ~TileScope() { __asm__ volatile("tilerelease"); }
};
template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_multiply_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace

#endif
