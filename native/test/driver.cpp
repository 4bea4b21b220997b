// Random shapes and damaged arguments through the C interface, for scripts/sanitize_kernels.sh and
// scripts/emulate_levels.sh. Every buffer has exactly the size it must have, so that a sanitizer sees the first byte
// too far. Levels are compared with the portable one; 54 rounds are every format with every activation.
// Usage: driver [rounds [seed [level ...]]]; the levels named must be there.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../format.h"
#include "../manyhands.h"

namespace {

std::mt19937_64 generator(1);
int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }
int64_t up_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Bytes {  // exactly `size` bytes on a 64-byte boundary
  uint8_t* data;
  int64_t size;
  explicit Bytes(int64_t n) : data(nullptr), size(n) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(n > 0 ? n : 1))) abort();
    data = static_cast<uint8_t*>(p);
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { free(data); }
};

// Mostly odd sizes, sometimes whole panels, sometimes more than the kernels multiply at a time.
int64_t width() {
  const int64_t kind = any(0, 11);
  return kind == 0 ? any(257, 420) : kind < 4 ? 16 * any(1, 6) : any(1, 90);
}
uint16_t to_bf16(float x) {  // cut off, not rounded
  uint32_t word;
  memcpy(&word, &x, 4);
  return static_cast<uint16_t>(word >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float y;
  memcpy(&y, &word, 4);
  return y;
}
std::vector<float> from_bf16(const std::vector<uint16_t>& from) {
  std::vector<float> to;
  for (const uint16_t x : from) to.push_back(from_bf16(x));
  return to;
}
std::vector<uint16_t> to_bf16(const std::vector<float>& from) {
  std::vector<uint16_t> to;
  for (const float x : from) to.push_back(to_bf16(x));
  return to;
}
// `exact`: values that bf16 holds, which no level rounds.
std::vector<float> normals(int64_t n, bool exact, float scale = 1) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = scale * normal();
  if (exact)
    for (float& x : v) x = from_bf16(to_bf16(x));
  return v;
}

void expect(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "driver: %s: %s\n", what, mh_error());
  exit(1);
}

int64_t lay_out(mh_matrix& m, int64_t at, bool bias) {  // the sections of one matrix; returns their end
  int64_t bytes[3];
  expect(!mh_matrix_bytes(&m, bytes), "matrix bytes");
  m.weight = at;
  at = up_to(at + bytes[0], 64);
  m.scales = bytes[1] ? at : -1;
  at = up_to(at + bytes[1], 64);
  m.bias = bias ? at : -1;
  return bias ? at + bytes[2] : at;
}

uint16_t to_half(float x) {  // of a positive number that a half can hold; what it cannot is cut off
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits >> 13) - (112u << 10));
}

// Integer weights and plausible scales; where `exact`, powers of two.
void fill(uint8_t* record, const mh_matrix& m, int64_t end, bool exact) {
  const mh::Format& f = mh::kFormats[m.format];
  const int64_t low = m.format == MH_INT8 ? -127 : -128;
  for (int64_t i = m.weight; i < m.scales; i++) record[i] = static_cast<uint8_t>(any(low, 127));
  const int64_t last = m.bias >= 0 ? m.bias : end;
  const int64_t scale_bytes = f.scale_bytes;
  for (int64_t i = m.scales; i + 4 <= last; i += scale_bytes) {
    const float size = exact ? ldexpf(1, static_cast<int>(any(-6, -3))) : 0.02f * static_cast<float>(any(1, 9));
    const float s = f.bits == 8 ? size / 16 : size;
    const uint16_t short_s = f.half ? to_half(s) : to_bf16(s);
    scale_bytes == 4 ? memcpy(record + i, &s, 4) : memcpy(record + i, &short_s, 2);
  }
  for (int64_t i = m.bias; m.bias >= 0 && i + 4 <= end; i += 4) {
    const float b = normal();
    memcpy(record + i, &b, 4);
  }
}

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
struct {
  int64_t values;
  double farthest;
} compared[5];

// `largest`: every difference against the largest value. `norm`: the differences' norm against the values', where a few
// values may fall to the other side of a kink. What is not finite is the same on both sides.
enum Measure { largest, norm };
void close(const std::vector<float>& a, const std::vector<float>& b, int64_t level, Measure by, double tolerance,
           const char* what) {
  double most = 1, far = 0, squares = 0, errors = 0;
  size_t worst = 0;
  for (size_t i = 0; i < b.size(); i++) {
    if (!isfinite(b[i]) && (isnan(b[i]) ? isnan(a[i]) : a[i] == b[i])) continue;
    const double value = fabs(double(b[i]));
    const double error = isfinite(a[i]) && isfinite(b[i]) ? fabs(double(a[i]) - b[i]) : 1e30;
    most = value > most ? value : most;
    if (error > far) far = error, worst = i;
    squares += value * value, errors += error * error;
  }
  const double off = by == largest ? far / most : errors > 0 ? sqrt(errors / (squares + 1e-6)) : 0;
  compared[level].values += static_cast<int64_t>(b.size());
  if (off > compared[level].farthest) compared[level].farthest = off;
  if (off <= tolerance) return;
  fprintf(stderr, "driver: %s: %s is off by %g; %s[%zu] of %zu is %g, not %g\n", kNames[level], what, off, what, worst,
          b.size(), a[worst], b[worst]);
  exit(1);
}

bool has(int64_t level) { return mh_levels() >> level & 1; }

// Float weights [count][parts * outputs][inputs] and biases into records of `size` bytes, value by value.
void pack(uint8_t* records, int64_t size, const mh_matrix& m, const std::vector<float>& w, const std::vector<float>& b,
          int64_t count) {
  const int64_t depth = up_to(m.inputs, 64), N = m.parts * m.outputs;
  const auto put = [&](uint8_t* section, int64_t i, float x) {
    const uint16_t short_x = to_bf16(x);
    m.format == MH_BF16 ? memcpy(section + 2 * i, &short_x, 2) : memcpy(section + 4 * i, &x, 4);
  };
  for (int64_t row = 0; row < count * N; row++) {
    const int64_t part = row % N / m.outputs, output = row % m.outputs, lane = output % 16;
    const int64_t panel = output / 16 * m.parts + part, steps = m.format == MH_BF16 ? 2 : 1;
    uint8_t* record = records + row / N * size;
    for (int64_t k = 0; k < m.inputs; k++)
      put(record + m.weight, panel * 16 * depth + k / steps * steps * 16 + lane * steps + k % steps,
          w[row * m.inputs + k]);
    if (m.bias >= 0) memcpy(record + m.bias + 4 * (16 * panel + lane), &b[row], 4);
  }
}

}  // namespace

#include "fetch.h"

namespace {

struct Results {
  std::vector<float> y, dx, dweights, dup, ddown, dup_bias, ddown_bias;
};

void experts_round(int64_t round) {
  const int64_t format = round % MH_FORMATS, activation = round / MH_FORMATS % 6, parts = activation < MH_GELU ? 2 : 1,
                bias = any(0, 1);
  const int64_t D = width(), F = width(), E = any(1, 5), K = any(1, E), size_of_t = D * F > 8100 ? 1 : any(0, 9);
  const int64_t T = size_of_t < 4 ? any(0, 9) : size_of_t < 8 ? any(0, 60) : any(100, 300);
  const bool plain = mh::kFormats[format].plain, rounds = !mh::kFormats[format].exact;
  const bool exact = any(0, 1), short_rows = any(0, 3) == 0, endless = !exact && T && any(0, 5) == 0;
  mh_matrix up{F, D, parts, format, 32 * any(1, 2), 0, 0, 0}, down{D, F, 1, format, up.group, 0, 0, 0};
  int64_t up_end = 0, size = 64;
  if (!plain) {
    up_end = lay_out(up, 0, bias);
    size = up_to(lay_out(down, up_to(up_end, 64), bias), 64);
  }
  Bytes records(plain ? 64 : E * size);
  memset(records.data, 0, static_cast<size_t>(records.size));
  std::vector<float> w_up = normals(E * parts * F * D, exact, 0.2f), w_down = normals(E * D * F, exact, 0.2f);
  std::vector<float> b_up = normals(E * parts * F, exact), b_down = normals(E * D, exact);
  std::vector<uint16_t> h_up = to_bf16(w_up), h_down = to_bf16(w_down);
  if (format <= MH_BF16) {
    pack(records.data, size, up, w_up, b_up, E), pack(records.data, size, down, w_down, b_down, E);
  } else if (!plain) {
    for (int64_t e = 0; e < E; e++)
      fill(records.data + e * size, up, up_end, exact), fill(records.data + e * size, down, size, exact);
  }
  const Table table(records.data, plain ? 0 : E, size);
  const mh_experts packed{table.places.data(), E, size, activation, up, down};
  const bool short_weights = format == MH_PLAIN_BF16;
  const mh_stacked stacked{short_weights ? static_cast<void*>(h_up.data()) : w_up.data(),
                           short_weights ? static_cast<void*>(h_down.data()) : w_down.data(),
                           bias ? b_up.data() : nullptr,
                           bias ? b_down.data() : nullptr,
                           format,
                           E,
                           D,
                           F,
                           activation};
  std::vector<int64_t> ids;
  std::vector<uint8_t> kept;
  for (int64_t t = 0; t < T; t++)
    for (int64_t k = 0, first = any(0, E - 1); k < K; k++) {
      kept.push_back(any(0, 9) > 0);
      ids.push_back(kept.back() ? (first + k) % E : any(-1, 1) * 1000);
    }
  const int64_t stride = D + any(0, 3), hidden_width = parts * up_to(F, 16);
  std::vector<float> x = normals(T * stride + 1, exact), dy = normals(T * stride + 1, exact);
  std::vector<float> weights = normals(T * K, false);
  if (endless) x[static_cast<size_t>(any(1, T * stride))] = any(0, 1) ? INFINITY : NAN;
  std::vector<uint16_t> short_x = to_bf16(x), short_dy = to_bf16(dy);
  const auto rows = [&](std::vector<float>& from, std::vector<uint16_t>& short_from) {
    const size_t first = T ? 1 : 0;  // not on a boundary
    void* data = short_rows ? static_cast<void*>(short_from.data() + first) : from.data() + first;
    return mh_rows{data, short_rows, T, D, stride};
  };
  const mh_rows in = rows(x, short_x), grad = rows(dy, short_dy);
  const mh_routing routing{ids.data(), weights.data(), kept.data(), T, K};
  Results first;
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    const int64_t alone = any(0, 1);  // each row
    const mh_run run{level, any(1, 3), alone}, other_run{level, any(1, 3), alone};
    Results r{normals(T * D, false),     normals(T * D, false),
              normals(T * K, false),     normals(E * parts * F * D, false),
              normals(E * D * F, false), normals(E * parts * F, false),
              normals(E * D, false)};
    std::vector<float> hidden(static_cast<size_t>(T * K * hidden_width)), again(r.y);
    std::vector<uint16_t> short_y = to_bf16(r.y), short_again = short_y, short_dx = short_y;
    const auto out = [&](std::vector<float>& to, std::vector<uint16_t>& short_to) {
      return mh_rows{short_rows ? static_cast<void*>(short_to.data()) : to.data(), short_rows, T, D, D};
    };
    const mh_rows y = out(r.y, short_y), y_again = out(again, short_again), dx = out(r.dx, short_dx);
    const int64_t room = static_cast<int64_t>(hidden.size());
    const mh_experts* experts = plain ? nullptr : &packed;
    const mh_stacked* stack = plain ? &stacked : nullptr;
    const mh_gradients wanted{r.dweights.data(), r.dup.data(), r.ddown.data(), r.dup_bias.data(), r.ddown_bias.data()};
    expect(!mh_forward(experts, stack, &routing, &in, &y, hidden.data(), room, &run), "forward");
    expect(!mh_forward(experts, stack, &routing, &in, &y_again, nullptr, 0, &other_run), "forward without hidden");
    expect(!mh_backward(experts, stack, &routing, &in, &grad, hidden.data(), room, &dx, &wanted, &run), "backward");
    if (short_y != short_again || (T && memcmp(r.y.data(), again.data(), 4 * again.size())))
      expect(false, "another number of threads, another y");
    if (!plain) fetch_round(packed, routing, in, short_rows ? static_cast<void*>(short_y.data()) : r.y.data(), run);
    if (short_rows) r.y = from_bf16(short_y), r.dx = from_bf16(short_dx);
    if (level == MH_PORTABLE) {
      first = r;
      continue;
    }
    // An integer format rounds activations, so that the last bit before may be a step of 1/127 after.
    const bool coarse = level >= MH_AVX512_BF16 && rounds;
    const float steps = coarse ? 3e-2f : mh::kFormats[format].integer ? 1e-2f : 1e-4f;
    const float rows_too = short_rows && steps < 1e-2f ? 1e-2f : steps;
    close(r.y, first.y, level, largest, rows_too, "y");
    const bool kinks = activation == MH_RELU || activation == MH_SWIGLU_OAI;
    if (kinks && coarse && !exact) continue;
    const Measure by = kinks ? norm : largest;
    const float more = kinks ? 3e-2f : 0;
    close(r.dx, first.dx, level, by, rows_too + more, "dx");
    close(r.dweights, first.dweights, level, by, steps + more, "dweights");
    close(r.dup, first.dup, level, by, steps + more, "dup");
    close(r.ddown, first.ddown, level, by, steps + more, "ddown");
    close(r.dup_bias, first.dup_bias, level, by, steps + more, "dup_bias");
    close(r.ddown_bias, first.ddown_bias, level, by, steps + more, "ddown_bias");
  }
}

std::vector<float> plainly(const std::vector<float>& w, const std::vector<float>& b, bool bias,
                           const std::vector<float>& x, int64_t T, int64_t stride) {
  const int64_t N = static_cast<int64_t>(b.size()), K = static_cast<int64_t>(w.size()) / N;
  std::vector<float> y(static_cast<size_t>(T * stride));
  for (int64_t t = 0; t < T; t++)
    for (int64_t n = 0; n < N; n++) {
      double sum = bias ? b[n] : 0;
      for (int64_t k = 0; k < K; k++) sum += double(w[n * K + k]) * x[t * K + k];
      y[t * stride + n] = static_cast<float>(sum);
    }
  return y;
}

void linear_round(int64_t round) {
  const int64_t format = round % MH_PLAIN_FLOAT32, N = width(), K = any(1, 600),
                T = any(0, 2) ? any(0, 24) : any(0, 130);
  const int64_t bias = any(0, 1), stride = N + any(0, 3);
  const bool exact = any(0, 2) > 0;
  mh_matrix m{N, K, 1, format, 32 * any(1, 2), 0, 0, 0};
  const int64_t size = up_to(lay_out(m, 0, bias), 64);
  Bytes record(size);
  memset(record.data, 0, static_cast<size_t>(size));
  std::vector<float> w = normals(N * K, exact), b = normals(N, exact), x = normals(T * K, exact), first;
  if (format <= MH_BF16)
    pack(record.data, size, m, w, b, 1);
  else
    fill(record.data, m, size, exact);
  const mh_linear line{record.data, size, m, nullptr};
  const bool endless = T && any(0, 3) == 0;
  if (endless) x[static_cast<size_t>(any(0, K - 1))] = NAN;
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    std::vector<float> y(static_cast<size_t>(T * stride));
    std::vector<uint16_t> z(static_cast<size_t>(T * stride));
    const mh_run run{level, any(1, 3), any(0, 1)};
    const mh_rows in{x.data(), 0, T, K, K}, out{y.data(), 0, T, N, stride}, short_out{z.data(), 1, T, N, stride};
    expect(!mh_linear_forward(&line, &in, &out, &run), "linear");
    if (run.exact && T) {
      const int64_t t = any(0, T - 1);
      std::vector<float> one(static_cast<size_t>(N));
      const mh_rows in_one{x.data() + t * K, 0, 1, K, K}, out_one{one.data(), 0, 1, N, N};
      expect(!mh_linear_forward(&line, &in_one, &out_one, &run), "linear of one row");
      if (memcmp(one.data(), y.data() + t * stride, 4 * one.size())) expect(false, "other rows, other bits");
    }
    expect(!mh_linear_forward(&line, &in, &short_out, &run), "linear to bf16");
    for (int64_t n = 0; endless && n < N; n++) expect(isnan(y[static_cast<size_t>(n)]), "a NaN is lost");
    if (level == MH_PORTABLE) first = y;
    if (level == MH_PORTABLE && format <= MH_BF16 && exact)
      close(y, plainly(w, b, bias, x, T, stride), level, largest, 1e-4, "linear");
    close(y, first, level, largest, level >= MH_AVX512_BF16 && format == MH_BF16 && !exact ? 2e-2 : 1e-4, "linear");
    close(from_bf16(z), y, level, largest, 4e-3, "linear to bf16");
  }
}

// One field after another set to something that cannot be: an error code, or a result, but never a touch outside.
void damaged_round() {
  mh_matrix m{any(1, 40), any(1, 100), 1, any(0, MH_PLAIN_FLOAT32 - 1), 32, 0, 0, 0};
  const int64_t size = up_to(lay_out(m, 0, true), 64);
  Bytes record(size);
  memset(record.data, 0, static_cast<size_t>(size));
  mh_linear line{record.data, size, m, nullptr};
  int64_t* fields[] = {&line.bytes,         &line.weight.outputs, &line.weight.inputs,
                       &line.weight.parts,  &line.weight.format,  &line.weight.group,
                       &line.weight.weight, &line.weight.scales,  &line.weight.bias};
  static const int64_t values[] = {-1, 0, 1, 2, 3, 7, 63, 64, 4096, 1 << 20, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  *fields[any(0, 8)] = values[any(0, 12)];
  const int64_t N = line.weight.outputs, K = line.weight.inputs;
  if (N < 1 || N > 4096 || K < 1 || K > 4096) {
    float nothing = 0;
    const mh_rows rows{&nothing, 0, 0, K, K}, out{&nothing, 0, 0, N, N};
    const mh_run run{MH_BEST, 1, 0};
    mh_linear_forward(&line, &rows, &out, &run);
    return;
  }
  std::vector<float> x(static_cast<size_t>(3 * K)), y(static_cast<size_t>(3 * N));
  const mh_rows in{x.data(), 0, 3, K, K}, out{y.data(), 0, 3, N, N};
  const mh_run run{MH_BEST, 1, 0};
  mh_linear_forward(&line, &in, &out, &run);
}

}  // namespace

#include "steps.h"

int main(int count, char** arguments) {
  const int rounds = count > 1 ? atoi(arguments[1]) : 200;
  if (count > 2) generator.seed(strtoull(arguments[2], nullptr, 10));
  for (int i = 3; i < count; i++)
    for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++)
      if (!strcmp(arguments[i], kNames[level]) && !has(level)) {
        fprintf(stderr, "driver: no %s here, levels %lld\n", kNames[level], static_cast<long long>(mh_levels()));
        return 1;
      }
  for (int i = 0; i < rounds; i++) experts_round(i), linear_round(i), damaged_round(), step_rounds();
  const mh_run bad{MH_BEST, 0, 0};
  expect(mh_linear_forward(nullptr, nullptr, nullptr, &bad) == MH_BAD_ARGUMENT, "0 threads");
  expect(mh_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr) == MH_BAD_ARGUMENT, "nulls");
  printf("%d rounds: clean\n", rounds);
  for (int64_t level = MH_AVX2; level <= MH_AMX; level++)
    if (has(level))
      printf("%s: %lld values beside the portable level's, the farthest off by %.2g\n", kNames[level],
             static_cast<long long>(compared[level].values), compared[level].farthest);
}
