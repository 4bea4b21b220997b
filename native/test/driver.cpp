// Random shapes, formats and damaged arguments through the C interface, for scripts/sanitize_kernels.sh. Every buffer
// has exactly the size it must have, so that a sanitizer sees the first byte too far. Levels are compared with the
// portable one.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

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

std::vector<float> normals(int64_t n, float scale = 1) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = scale * normal();
  return v;
}

int64_t place(mh_matrix& m, int64_t at, bool bias) {  // the sections of one matrix; returns their end
  static const int64_t bits[] = {32, 16, 8, 4};
  const int64_t depth = up_to(m.inputs, 64), panels = m.parts * (up_to(m.outputs, 16) / 16);
  m.weight = at;
  at = up_to(at + panels * 16 * depth * bits[m.format] / 8, 64);
  m.scales = m.format >= MH_INT8 ? at : -1;
  if (m.format == MH_INT8) at = up_to(at + panels * 64, 64);
  if (m.format == MH_INT4) at = up_to(at + panels * 32 * (depth / m.group), 64);
  m.bias = bias ? at : -1;
  return bias ? at + panels * 64 : at;
}

void fill(uint8_t* record, const mh_matrix& m, int64_t end) {  // integer weights and plausible scales
  const int64_t low = m.format == MH_INT8 ? -127 : -128;
  for (int64_t i = m.weight; i < m.scales; i++) record[i] = static_cast<uint8_t>(any(low, 127));
  const int64_t last = m.bias >= 0 ? m.bias : end;
  for (int64_t i = m.scales; i + 4 <= last; i += m.format == MH_INT8 ? 4 : 2) {
    const float s = 0.02f * static_cast<float>(any(1, 9)) / (m.format == MH_INT8 ? 16 : 1);
    uint32_t word;
    memcpy(&word, &s, 4);
    const uint16_t half = static_cast<uint16_t>(word >> 16);
    m.format == MH_INT8 ? memcpy(record + i, &s, 4) : memcpy(record + i, &half, 2);
  }
  for (int64_t i = m.bias; m.bias >= 0 && i + 4 <= end; i += 4) {
    const float b = normal();
    memcpy(record + i, &b, 4);
  }
}

void expect(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "driver: %s: %s\n", what, mh_error());
  exit(1);
}

void close(const std::vector<float>& a, const std::vector<float>& b, float tolerance, const char* what) {
  float most = 1;
  for (const float x : b) most = fabsf(x) > most ? fabsf(x) : most;
  for (size_t i = 0; i < a.size(); i++) {
    if (fabsf(a[i] - b[i]) <= tolerance * most) continue;
    fprintf(stderr, "driver: %s[%zu] of %zu is %g, not %g (largest %g)\n", what, i, a.size(), a[i], b[i], most);
    exit(1);
  }
}

struct Results {
  std::vector<float> y, dx, dweights, dup, ddown, dup_bias, ddown_bias;
};

void experts_round() {
  const int64_t format = any(MH_FLOAT32, MH_PLAIN_ROUNDED), plain = format >= MH_PLAIN_FLOAT32;
  const int64_t E = any(1, 5), D = any(1, 90), F = any(1, 90), K = any(1, E), T = any(0, 20) ? any(0, 40) : 300;
  const int64_t activation = any(MH_SWIGLU, MH_RELU), parts = activation < MH_GELU ? 2 : 1, bias = any(0, 1);
  mh_matrix up{F, D, parts, format, 32 * any(1, 2), 0, 0, 0}, down{D, F, 1, format, up.group, 0, 0, 0};
  int64_t up_end = 0, size = 64;
  if (!plain) {
    up_end = place(up, 0, bias);
    size = up_to(place(down, up_to(up_end, 64), bias), 64);
  }
  Bytes records(plain ? 64 : E * size);
  memset(records.data, 0, static_cast<size_t>(records.size));
  std::vector<float> w_up = normals(E * parts * F * D, 0.2f), w_down = normals(E * D * F, 0.2f);
  std::vector<float> b_up = normals(E * parts * F), b_down = normals(E * D);
  std::vector<uint16_t> h_up(w_up.size()), h_down(w_down.size());
  const auto half = [](const std::vector<float>& from, std::vector<uint16_t>& to) {
    for (size_t i = 0; i < from.size(); i++) {
      uint32_t word;
      memcpy(&word, &from[i], 4);
      to[i] = static_cast<uint16_t>(word >> 16);
    }
  };
  half(w_up, h_up), half(w_down, h_down);
  const mh_run one{MH_PORTABLE, 2};
  if (format <= MH_BF16) {
    const mh_rows u{w_up.data(), 0, E * parts * F, D, D}, d{w_down.data(), 0, E * D, F, F};
    const mh_rows bu{b_up.data(), 0, E, parts * F, parts * F}, bd{b_down.data(), 0, E, D, D};
    expect(!mh_pack(records.data, records.size, &up, &u, bias ? &bu : nullptr, &one), "pack up");
    expect(!mh_pack(records.data, records.size, &down, &d, bias ? &bd : nullptr, &one), "pack down");
  } else if (!plain) {
    for (int64_t e = 0; e < E; e++) fill(records.data + e * size, up, up_end), fill(records.data + e * size, down, size);
  }
  const mh_experts packed{records.data, records.size, E, size, activation, up, down};
  const bool halves = format == MH_PLAIN_BF16;
  const mh_stacked stacked{halves ? static_cast<void*>(h_up.data()) : w_up.data(),
                           halves ? static_cast<void*>(h_down.data()) : w_down.data(),
                           bias ? b_up.data() : nullptr, bias ? b_down.data() : nullptr, format, E, D, F, activation};
  std::vector<int64_t> ids;
  std::vector<uint8_t> kept;
  for (int64_t t = 0; t < T; t++)
    for (int64_t k = 0, first = any(0, E - 1); k < K; k++) {
      kept.push_back(any(0, 9) > 0);
      ids.push_back(kept.back() ? (first + k) % E : any(-1, 1) * 1000);
    }
  const int64_t stride = D + any(0, 3), hidden_width = parts * up_to(F, 16);
  std::vector<float> x = normals(T * stride + 1), dy = normals(T * stride + 1), weights = normals(T * K);
  const mh_routing routing{ids.data(), weights.data(), kept.data(), T, K};
  Results first;
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!(mh_levels() >> level & 1)) continue;
    const mh_run run{level, any(1, 3)};
    Results r{normals(T * D), normals(T * D), normals(T * K), normals(E * parts * F * D), normals(E * D * F),
              normals(E * parts * F), normals(E * D)};
    std::vector<float> hidden(static_cast<size_t>(T * K * hidden_width));
    const mh_rows in{x.data() + (T ? 1 : 0), 0, T, D, stride}, grad{dy.data() + (T ? 1 : 0), 0, T, D, stride};
    const mh_rows out{r.y.data(), 0, T, D, D}, dx{r.dx.data(), 0, T, D, D};
    const int64_t room = static_cast<int64_t>(hidden.size());
    expect(!mh_forward(plain ? nullptr : &packed, plain ? &stacked : nullptr, &routing, &in, &out, hidden.data(), room,
                       &run), "forward");  // clang-format off
    const mh_gradients wanted{r.dweights.data(), r.dup.data(), r.ddown.data(), r.dup_bias.data(), r.ddown_bias.data()};
    expect(!mh_backward(plain ? nullptr : &packed, plain ? &stacked : nullptr, &routing, &in, &grad, hidden.data(),
                        room, &dx, &wanted, &run), "backward");
    if (level == MH_PORTABLE) {
      first = r;
      continue;
    }
    const float tolerance = level == MH_AMX ? 6e-2f : format == MH_INT8 || format == MH_INT4 ? 1e-2f : 1e-4f;
    close(r.y, first.y, tolerance, "y");
    if (activation == MH_RELU || activation == MH_SWIGLU_OAI) continue;  // a kink may fall to the other side
    close(r.dx, first.dx, tolerance, "dx");
    close(r.dweights, first.dweights, tolerance, "dweights");
    close(r.dup, first.dup, tolerance, "dup"), close(r.ddown, first.ddown, tolerance, "ddown");
    close(r.dup_bias, first.dup_bias, tolerance, "dup_bias"), close(r.ddown_bias, first.ddown_bias, tolerance, "db");
  }
}

void linear_round() {
  const int64_t format = any(MH_FLOAT32, MH_INT4), N = any(1, 90), K = any(1, 600), T = any(0, 12), bias = any(0, 1);
  mh_matrix m{N, K, 1, format, 32 * any(1, 2), 0, 0, 0};
  const int64_t size = up_to(place(m, 0, bias), 64);
  Bytes record(size);
  memset(record.data, 0, static_cast<size_t>(size));
  std::vector<float> w = normals(N * K), b = normals(N), x = normals(T * K), first;
  const mh_rows weights{w.data(), 0, N, K, K}, biases{b.data(), 0, 1, N, N};
  const mh_run one{MH_PORTABLE, 1};
  if (format <= MH_BF16)
    expect(!mh_pack(record.data, size, &m, &weights, bias ? &biases : nullptr, &one), "pack");
  else
    fill(record.data, m, size);
  const mh_linear line{record.data, size, m};
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!(mh_levels() >> level & 1)) continue;
    std::vector<float> y(static_cast<size_t>(T * N));
    std::vector<uint16_t> z(static_cast<size_t>(T * N));
    const mh_run run{level, 2};
    const mh_rows in{x.data(), 0, T, K, K}, out{y.data(), 0, T, N, N}, halves{z.data(), 1, T, N, N};
    expect(!mh_linear_forward(&line, &in, &out, &run), "linear");
    expect(!mh_linear_forward(&line, &in, &halves, &run), "linear to bf16");
    if (level == MH_PORTABLE) first = y;
    close(y, first, level == MH_AMX ? 6e-2f : 1e-4f, "linear");
  }
}

// One field after another set to something that cannot be: an error code, or a result, but never a touch outside.
void damaged_round() {
  mh_matrix m{any(1, 40), any(1, 100), 1, any(MH_FLOAT32, MH_INT4), 32, 0, 0, 0};
  const int64_t size = up_to(place(m, 0, true), 64);
  Bytes record(size);
  memset(record.data, 0, static_cast<size_t>(size));
  mh_linear line{record.data, size, m};
  int64_t* fields[] = {&line.bytes, &line.weight.outputs, &line.weight.inputs, &line.weight.parts, &line.weight.format,
                       &line.weight.group, &line.weight.weight, &line.weight.scales, &line.weight.bias};
  static const int64_t values[] = {-1, 0, 1, 2, 3, 7, 63, 64, 4096, 1 << 20, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  *fields[any(0, 8)] = values[any(0, 12)];
  const int64_t N = line.weight.outputs, K = line.weight.inputs;
  if (N < 1 || N > 4096 || K < 1 || K > 4096) {
    float nothing = 0;
    const mh_rows rows{&nothing, 0, 0, K, K}, out{&nothing, 0, 0, N, N};
    const mh_run run{MH_BEST, 1};
    mh_linear_forward(&line, &rows, &out, &run);
    return;
  }
  std::vector<float> x(static_cast<size_t>(3 * K)), y(static_cast<size_t>(3 * N));
  const mh_rows in{x.data(), 0, 3, K, K}, out{y.data(), 0, 3, N, N};
  const mh_run run{MH_BEST, 1};
  mh_linear_forward(&line, &in, &out, &run);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? atoi(arguments[1]) : 200;
  for (int i = 0; i < rounds; i++) experts_round(), linear_round(), damaged_round();
  const mh_run bad{MH_BEST, 0};
  expect(mh_linear_forward(nullptr, nullptr, nullptr, &bad) == MH_BAD_ARGUMENT, "0 threads");
  expect(mh_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr) == MH_BAD_ARGUMENT, "nulls");
  printf("%d rounds, levels %lld: clean\n", rounds, static_cast<long long>(mh_levels()));
}
