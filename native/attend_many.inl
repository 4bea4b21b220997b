// Attention of many rows to one split of keys, the bits of attend.inl's few: keys are turned so that sixteen of them lie
// in a vector, one for each of the sixteen sums over the width, which are then added as `sum` adds its lanes.
#pragma once

#include "attend.inl"

namespace {

constexpr int64_t kKeysAtOnce = 64;  // whose values of a strip stay in the first cache
constexpr int64_t kTile = 16 * kScoreTiles, kStrip = 16 * kMixStrip;

// f(Number<M>) for what is left, at most M.
template <int M, class F>
inline void with_at_most(int64_t left, const F& f) {
  if constexpr (M > 1) {
    if (left < M) return with_at_most<M - 1>(left, f);
  }
  f(Number<M>{});
}

// f(i, run, key): key i of the split is a run's key.
template <class F>
inline void each_key(const mh::KvSplit& s, const F& f) {
  int64_t i = 0;
  for (const mh::KvRun* run = s.runs; run < s.runs + s.run_count; run++)
    for (int64_t j = 0; j < run->keys; j++, i++) f(i, *run, j);
}

// Rows of `width` numbers -> [count / 16][width][16], zeros for the rows that a tile lacks
template <class T>
void turn_rows(const T* const* rows, int64_t count, int64_t width, float* to) {
  float block[256];
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t j = 0; j < width; j += 16, to += 256) {
      for (int64_t n = 0; n < 16; n++) store(block + 16 * n, i + n < count ? row_part(rows[i + n], j) : set1(0));
      transpose16(block, 16, to);
    }
  for (int64_t i = (count + 15) / 16 * 16; i % kTile; i += 16)
    for (int64_t j = 0; j < width; j++, to += 16) store(to, set1(0));
}

template <class T>
void turn_keys(const mh::KvSplit& s, float* to) {
  const T* rows[mh::kSplitKeys];
  each_key(s, [&](int64_t i, const mh::KvRun& run, int64_t j) {
    rows[i] = static_cast<const T*>(run.k) + j * s.k_stride;
  });
  turn_rows(rows, s.keys, s.k_width, to);
}

// [keys][width] -> strips of kStrip columns, [keys][kStrip] each
template <class T>
void lay_values(const mh::KvSplit& s, float* to) {
  each_key(s, [&](int64_t i, const mh::KvRun& run, int64_t n) {
    const T* v = static_cast<const T*>(run.v) + n * s.v_stride;
    for (int64_t j = 0; j < s.v_width; j += kStrip) {
      const int64_t columns = least(kStrip, s.v_width - j);
      float* at = to + j * mh::kSplitKeys + i * columns;
      for (int64_t c = 0; c < columns; c += 16) store(at + c, row_part(v, j + c));
    }
  });
}

// Products of M rows with kTile keys: sums over every sixteenth number of the width, added in sum's order.
template <int M>
void score_tile(const float* const* q, const float* keys, int64_t width, float* out, int64_t out_stride) {
  constexpr int N = kScoreTiles;
  V halves[8][M][N];
  for (int l = 0; l < 8; l++) {
    V low[M][N], high[M][N];
    times<M * N>([&](auto i) { low[i.value / N][i.value % N] = high[i.value / N][i.value % N] = set1(0); });
    const float* k = keys + 16 * l;
    for (int64_t j = l; j < width; j += 16, k += 256) {
      times<N>([&](auto n) {
        const V key = load(k + n.value * 16 * width);
        times<M>([&](auto m) { low[m.value][n.value] = fma(set1(q[m.value][j]), key, low[m.value][n.value]); });
      });
      times<N>([&](auto n) {
        const V key = load(k + 128 + n.value * 16 * width);
        times<M>([&](auto m) { high[m.value][n.value] = fma(set1(q[m.value][j + 8]), key, high[m.value][n.value]); });
      });
    }
    times<M * N>([&](auto i) {
      constexpr int m = i.value / N, n = i.value % N;
      halves[l][m][n] = add(low[m][n], high[m][n]);
    });
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      V quarters[4];
      for (int l = 0; l < 4; l++) quarters[l] = add(halves[l][m][n], halves[l + 4][m][n]);
      store(out + m * out_stride + 16 * n, add(add(quarters[0], quarters[2]), add(quarters[1], quarters[3])));
    }
}

// y_m += Σ_i p_m[i] · v_i over [first, last), one i after the other, in a strip of C sixteens
template <int M, int C>
void mix_tile(const float* p, int64_t p_stride, const float* v, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  V sums[M][C];
  times<M * C>([&](auto i) { sums[i.value / C][i.value % C] = load(y + i.value / C * y_stride + 16 * (i.value % C)); });
  v += first * 16 * C;
  for (int64_t i = first; i < last; i++, v += 16 * C) {
    V values[C];
    times<C>([&](auto c) { values[c.value] = load(v + 16 * c.value); });
    times<M>([&](auto m) {
      const V weight = set1(p[m.value * p_stride + i]);
      times<C>([&](auto c) { sums[m.value][c.value] = fma(weight, values[c.value], sums[m.value][c.value]); });
    });
  }
  times<M * C>([&](auto i) { store(y + i.value / C * y_stride + 16 * (i.value % C), sums[i.value / C][i.value % C]); });
}

// Keys [first, last) of M rows: those that all see together, the rest by the rows that see them (attend.inl says why).
template <int M, int C>
void mix_seen(const mh::KvSplit& s, int64_t r, const float* p, const float* v, int64_t first, int64_t last, float* y) {
  constexpr int64_t P = mh::kSplitKeys;
  const int64_t width = s.v_width;
  int64_t from = first, to = last;
  for (int m = 0; m < M; m++) from = from > s.from[r + m] ? from : s.from[r + m], to = least(to, s.to[r + m]);
  if (from >= to) from = to = last;
  for (int m = 0; m < M; m++) {
    const int64_t begin = first > s.from[r + m] ? first : s.from[r + m], end = least(from, s.to[r + m]);
    if (begin < end) mix_tile<1, C>(p + m * P, P, v, begin, end, y + m * width, width);
  }
  if (from < to) mix_tile<M, C>(p, P, v, from, to, y, width);
  for (int m = 0; m < M; m++) {
    const int64_t end = least(last, s.to[r + m]);
    if (to < end) mix_tile<1, C>(p + m * P, P, v, to, end, y + m * width, width);
  }
}

template <class T>
void attend_many(const mh::KvSplit& s) {
  float *p = s.scratch, *keys = p + s.rows * mh::kSplitKeys, *values = keys + s.k_width * mh::kSplitKeys;
  turn_keys<T>(s, keys);
  lay_values<T>(s, values);
  for (int64_t i = 0; i < s.keys; i += kTile)
    for (int64_t r = 0; r < s.rows; r += kAttendRows) {
      const int64_t last = least(r + kAttendRows, s.rows) - 1;  // limits do not fall from row to row
      if (i >= s.to[last] || i + kTile <= s.from[r]) continue;
      with_at_most<kAttendRows>(s.rows - r, [&](auto m) {
        score_tile<m.value>(s.q + r, keys + i * s.k_width, s.k_width, p + r * mh::kSplitKeys + i,
                            mh::kSplitKeys);
      });
    }
  for (int64_t r = 0; r < s.rows; r++) weigh(s, r, p + r * mh::kSplitKeys);
  for (int64_t j = 0; j < s.rows * s.v_width; j += 16) store(s.y + j, set1(0));
  for (int64_t i = 0; i < s.keys; i += kKeysAtOnce)
    for (int64_t j = 0; j < s.v_width; j += kStrip) {
      const float* v = values + j * mh::kSplitKeys;
      with_at_most<kMixStrip>((s.v_width - j) / 16, [&](auto c) {
        for (int64_t r = 0; r < s.rows; r += kAttendRows)
          with_at_most<kAttendRows>(s.rows - r, [&](auto m) {
            mix_seen<m.value, c.value>(s, r, p + r * mh::kSplitKeys, v, i, least(i + kKeysAtOnce, s.keys),
                                       s.y + r * s.v_width + j);
          });
      });
    }
}

void attend(const mh::KvSplit& s) {
  if (s.rows < mh::kManyRows)
    s.is_bf16 ? attend_few<uint16_t>(s) : attend_few<float>(s);
  else
    s.is_bf16 ? attend_many<uint16_t>(s) : attend_many<float>(s);
}

}  // namespace
