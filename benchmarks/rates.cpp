// Bare multiply-add instructions on as many threads as asked: what the units of this CPU do when nothing is read.
// Built and called by machine.py. The caller asks the CPU first: an instruction it lacks ends the process.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12, kRounds = 2048;  // independent sums hide the latency

#define KEEP(c) __asm__ volatile("" : "+v"(c))
#define LOOP(type, start, step)                    \
  type c[kChains];                                 \
  _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) c[j] = start; \
  for (int i = 0; i < kRounds; ++i)                \
    _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) { \
      c[j] = step;                                 \
      KEEP(c[j]);                                  \
    }

__attribute__((target("avx2,fma"))) void fma256() {
  const __m256 a = _mm256_set1_ps(1.0f);
  LOOP(__m256, _mm256_setzero_ps(), _mm256_fmadd_ps(a, a, c[j]))
}
__attribute__((target("avx2"))) void maddubs256() {
  const __m256i a = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  __m256i b = a;
  LOOP(__m256i, _mm256_setzero_si256(),
       (({ KEEP(b); }), _mm256_add_epi32(c[j], _mm256_madd_epi16(_mm256_maddubs_epi16(b, a), ones))))
}
__attribute__((target("avx512f"))) void fma512() {
  const __m512 a = _mm512_set1_ps(1.0f);
  LOOP(__m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a, a, c[j]))
}
__attribute__((target("avx512f,avx512vnni"))) void dpbusd512() {
  const __m512i a = _mm512_set1_epi8(1);
  LOOP(__m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(c[j], a, a))
}
__attribute__((target("avx512f,avx512bf16"))) void dpbf16_512() {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80);
  LOOP(__m512, _mm512_setzero_ps(), _mm512_dpbf16_ps(c[j], a, a))
}

void tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  syscall(SYS_arch_prctl, 0x1023, 18);  // permission for tile data
  __asm__ volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  __asm__ volatile("tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n"
                   "tilezero %tmm4\n tilezero %tmm5\n tilezero %tmm6\n tilezero %tmm7");
}
#define TILES(name)                                                                         \
  void name##_tiles() {                                                                     \
    tiles();                                                                                \
    for (int i = 0; i < kRounds; ++i)                                                       \
      __asm__ volatile(#name " %tmm6, %tmm4, %tmm0\n" #name " %tmm7, %tmm4, %tmm1\n" #name \
                             " %tmm6, %tmm5, %tmm2\n" #name " %tmm7, %tmm5, %tmm3");        \
    __asm__ volatile("tilerelease");                                                        \
  }
TILES(tdpbf16ps)
TILES(tdpbssd)

struct Unit {
  void (*work)();
  double operations;  // of one call, a multiply-add counted as two
};
constexpr double kVector = 2.0 * kChains * kRounds, kTiles = 2.0 * 4 * kRounds * 256;
const Unit units[] = {{fma256, 8 * kVector},      {maddubs256, 32 * kVector}, {fma512, 16 * kVector},
                      {dpbusd512, 64 * kVector},  {dpbf16_512, 32 * kVector}, {tdpbf16ps_tiles, 32 * kTiles},
                      {tdpbssd_tiles, 64 * kTiles}};

}  // namespace

// Operations a second of unit `number` on `threads` threads together: the best of some 10 ms spans.
extern "C" double unit_rate(int number, int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> best(threads, 0.0);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      for (int span = 0; span < 20; ++span) {
        const auto begin = Clock::now();
        double seconds = 0;
        int calls = 0;
        for (; seconds < 0.01; ++calls, seconds = std::chrono::duration<double>(Clock::now() - begin).count())
          units[number].work();
        best[t] = std::max(best[t], calls * units[number].operations / seconds);
      }
    });
  double sum = 0;
  for (int t = 0; t < threads; ++t) pool[t].join(), sum += best[t];
  return sum;
}
