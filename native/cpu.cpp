// Which levels this CPU and this operating system allow: asked, never assumed.
#include "kernels.h"
#include "manyhands.h"

#if defined(MH_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mh {

#if defined(MH_X86)
namespace {

uint64_t enabled_state() {  // XCR0: the registers the operating system saves
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

int64_t find_levels() {
  int64_t found = 1 << MH_PORTABLE;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  constexpr uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;  // FMA, OSXSAVE, AVX, F16C
  if ((c & needed) != needed) return found;
  const uint64_t state = enabled_state();
  uint32_t b7, c7, d7, a71, b71, c71, d71;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || (state & 0x6) != 0x6) return found;
  constexpr uint32_t avx2 = 1u << 5;
  if (!(b7 & avx2)) return found;
  found |= 1 << MH_AVX2;
  // F, DQ, BW, VL; VNNI
  constexpr uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
  if ((b7 & avx512) != avx512 || !(c7 & vnni) || (state & 0xe6) != 0xe6) return found;
  found |= 1 << MH_AVX512;
  constexpr uint32_t bf16 = 1u << 5, amx = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, TILE, INT8
  if (!__get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) || !(a71 & bf16)) return found;
  found |= 1 << MH_AVX512_BF16;
  if ((d7 & amx) != amx || (state & 0x60000) != 0x60000) return found;
  if (tiles_granted()) found |= 1 << MH_AMX;
  return found;
}

}  // namespace
#else
namespace {
int64_t find_levels() { return 1 << MH_PORTABLE; }
}  // namespace
#endif

int64_t levels() {
#if defined(MH_EMULATE)
  static const int64_t found = find_levels() | 1 << MH_AVX512_BF16 | 1 << MH_AMX;
#else
  static const int64_t found = find_levels();
#endif
  return found;
}

const Kernels* kernels(int64_t level) {
  if (level == MH_BEST) {
    level = MH_PORTABLE;
    for (int64_t l = MH_PORTABLE; l <= MH_AMX; l++)
      if (levels() >> l & 1) level = l;
  }
  if (level < MH_PORTABLE || level > MH_AMX || !(levels() >> level & 1)) return nullptr;
#if defined(MH_X86)
  if (level == MH_AMX) return &kAmx;
  if (level == MH_AVX512_BF16) return &kAvx512Bf16;
  if (level == MH_AVX512) return &kAvx512;
  if (level == MH_AVX2) return &kAvx2;
#endif
  return &kPortable;
}

}  // namespace mh
