// Attention of rows, queries of heads that share their keys, to one split of them; and the join of a row's splits.
#pragma once

#include "activation.inl"
#include "kernels.h"
#include "step.inl"

namespace {

// out[m · kSplitKeys + i] = q_m · k_i; the width is a multiple of 16
template <int M, class T>
void score_rows(const float* const* q, const mh::KvSplit& s, float* out) {
  for (const mh::KvRun* run = s.runs; run < s.runs + s.run_count; out += run++->keys) {
    const T* k = static_cast<const T*>(run->k);
    for (int64_t i = 0; i < run->keys; i++, k += s.k_stride) {
      V sums[M];
      for (int m = 0; m < M; m++) sums[m] = set1(0);
      for (int64_t j = 0; j < s.k_width; j += 16) {
        const V key = row_part(k, j);
        for (int m = 0; m < M; m++) sums[m] = fma(load(q[m] + j), key, sums[m]);
      }
      for (int m = 0; m < M; m++) out[m * mh::kSplitKeys + i] = sum(sums[m]);
    }
  }
}

// y_m += Σ_i p_m[i] · v_i over keys [first, last), key by key, in a strip of C sixteens
template <int M, int C, class T>
void mix_strip(const float* p, const mh::KvSplit& s, int64_t first, int64_t last, int64_t j, float* y) {
  V sums[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sums[m][c] = load(y + m * s.v_width + j + 16 * c);
  int64_t at = 0;
  for (const mh::KvRun* run = s.runs; run < s.runs + s.run_count && at < last; at += run++->keys) {
    const int64_t end = least(at + run->keys, last);
    int64_t i = at > first ? at : first;
    const T* v = static_cast<const T*>(run->v) + (i - at) * s.v_stride + j;
    for (; i < end; i++, v += s.v_stride)
      for (int c = 0; c < C; c++) {
        const V value = row_part(v, 16 * c);
        for (int m = 0; m < M; m++) sums[m][c] = fma(set1(p[m * mh::kSplitKeys + i]), value, sums[m][c]);
      }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(y + m * s.v_width + j + 16 * c, sums[m][c]);
}

template <int M, class T>
void mix_rows(const float* p, const mh::KvSplit& s, int64_t first, int64_t last, float* y) {
  if (first >= last) return;
  constexpr int C = 4 / M;
  int64_t j = 0;
  for (; j + 16 * C <= s.v_width; j += 16 * C) mix_strip<M, C, T>(p, s, first, last, j, y);
  for (; j < s.v_width; j += 16) mix_strip<M, 1, T>(p, s, first, last, j, y);
}

// Products of row r with the split's keys become weights: e^(scaled product - the largest). Keys before the first
// sixteen that it sees and after the last are not touched; their weights would be 0.
void weigh(const mh::KvSplit& s, int64_t r, float* p) {
  const int64_t from = s.from[r], to = s.to[r], first = from / 16 * 16, last = (to + 15) / 16 * 16;
  for (int64_t i = first; i < from; i++) p[i] = 0;
  for (int64_t i = to; i < last; i++) p[i] = 0;
  for (int64_t i = first; i < last; i += 16) {
    const V l = mul(load(p + i), set1(s.scale));
    store(p + i, s.cap > 0 ? mul(set1(s.cap), tanh(div(l, set1(s.cap)))) : l);
  }
  for (int64_t i = first; i < from; i++) p[i] = -__builtin_inff();
  for (int64_t i = to; i < last; i++) p[i] = -__builtin_inff();
  V most = load(p + first);
  for (int64_t i = first + 16; i < last; i += 16) most = max(most, load(p + i));
  float lanes[16], largest = -__builtin_inff();
  store(lanes, most);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  const V shift = set1(largest > -3.0e38f ? largest : 0.0f), low = set1(-3.0e38f);
  V total = set1(0);
  for (int64_t i = first; i < last; i += 16) {
    const V l = load(p + i), e = where_less(l, low, set1(0), exp(sub(l, shift)));
    store(p + i, e);
    total = add(total, e);
  }
  s.total[r] = sum(total);
  s.largest[r] = s.total[r] == s.total[r] ? largest : s.total[r];  // a NaN is lost among the largest, not in the sum
}

// Up to M rows that do not see the same: where they all see they are mixed together, and what only some see, which may
// hold anything for the others, by those alone.
template <int M, class T>
void mix_what_is_seen(const mh::KvSplit& s, int64_t r, const float* p, float* y) {
  int64_t from = s.from[r], to = s.to[r];
  for (int64_t m = r + 1; m < r + M; m++) from = from > s.from[m] ? from : s.from[m], to = least(to, s.to[m]);
  if (from >= to) from = to = mh::kSplitKeys;
  for (int64_t m = 0; m < M && M > 1; m++)
    mix_rows<1, T>(p + m * mh::kSplitKeys, s, s.from[r + m], least(from, s.to[r + m]), y + m * s.v_width);
  mix_rows<M, T>(p, s, from, to, y);
  for (int64_t m = 0; m < M && M > 1; m++)
    mix_rows<1, T>(p + m * mh::kSplitKeys, s, to, s.to[r + m], y + m * s.v_width);
}

template <int M, class T>
void attend_rows(const mh::KvSplit& s, int64_t r) {
  float *p = s.scratch, *y = s.y + r * s.v_width;
  score_rows<M, T>(s.q + r, s, p);
  for (int m = 0; m < M; m++) weigh(s, r + m, p + m * mh::kSplitKeys);
  for (int64_t j = 0; j < M * s.v_width; j += 16) store(y + j, set1(0));
  mix_what_is_seen<M, T>(s, r, p, y);
}

template <class T>
void attend_few(const mh::KvSplit& s) {
  int64_t r = 0;
  for (; r + 4 <= s.rows; r += 4) attend_rows<4, T>(s, r);
  for (; r < s.rows; r++) attend_rows<1, T>(s, r);
}

inline float exp_of(float x) {
  float lanes[16];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

void join(const mh::KvJoin& s, float* y) {
  float most = s.sink ? *s.sink : -__builtin_inff();
  for (int64_t i = 0; i < s.splits; i++) {
    const float l = s.largest[i * s.next];
    most = l > most || l != l ? l : most;
  }
  float all = s.sink ? exp_of(*s.sink - most) : 0.0f;
  for (int64_t j = 0; j < s.width; j += 16) store(y + j, set1(0));
  bool seen = false;
  for (int64_t i = 0; i < s.splits; i++) {
    const float largest = s.largest[i * s.next];
    if (largest == -__builtin_inff()) continue;  // nobody is seen there
    const float weight = exp_of(largest - most), *part = s.parts + i * s.next_part;
    all = __builtin_fmaf(weight, s.total[i * s.next], all);
    for (int64_t j = 0; j < s.width; j += 16) store(y + j, fma(set1(weight), load(part + j), load(y + j)));
    seen = true;
  }
  for (int64_t j = 0; seen && j < s.width; j += 16) store(y + j, div(load(y + j), set1(all)));
}

}  // namespace
