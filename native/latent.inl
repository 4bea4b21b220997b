// Rows of one head times its part of a latent's projection, many rows at a time: the bits of one.
#pragma once

#include "attend_many.inl"
#include "gemm_plain.inl"

namespace {

// y[j] = Σ_i x[i] · w[i][j], one i after the other
template <class T>
void mix_rows_of(const mh::HeadRows& s) {
  const T* w = static_cast<const T*>(s.w);
  for (int64_t j = 0; j < s.width; j += kStrip)
    with_at_most<kMixStrip>((s.width - j) / 16, [&](auto c) {
      constexpr int64_t columns = 16 * c.value;
      for (int64_t i = 0; i < s.n; i++)
        for (int64_t k = 0; k < columns; k += 16) store(s.scratch + i * columns + k, row_part(w + i * s.width, j + k));
      for (int64_t r = 0; r < s.rows; r += kAttendRows)
        with_at_most<kAttendRows>(s.rows - r, [&](auto m) {
          float* y = s.y + r * s.y_stride + j;
          for (int64_t n = 0; n < m.value; n++)
            for (int64_t k = 0; k < columns; k += 16) store(y + n * s.y_stride + k, set1(0));
          mix_tile<m.value, c.value>(s.x + r * s.x_stride, s.x_stride, s.scratch, 0, s.n, y, s.y_stride);
        });
    });
}

void mix_rows(const mh::HeadRows& s) { s.is_bf16 ? mix_rows_of<uint16_t>(s) : mix_rows_of<float>(s); }

// y[i] = x · w[i], as gemv has it
template <class T>
void dot_rows_of(const mh::HeadRows& s) {
  const T* w = static_cast<const T*>(s.w);
  for (int64_t i = 0; i < s.n; i += kTile) {
    const T* rows[kTile];
    const int64_t count = least(kTile, s.n - i);
    for (int64_t n = 0; n < count; n++) rows[n] = w + (i + n) * s.width;
    turn_rows(rows, count, s.width, s.scratch);
    for (int64_t r = 0; r < s.rows; r += kAttendRows) {
      const float* x[kAttendRows];
      float out[kAttendRows * kTile];
      const int64_t left = least(kAttendRows, s.rows - r);
      for (int64_t m = 0; m < left; m++) x[m] = s.x + (r + m) * s.x_stride;
      with_at_most<kAttendRows>(left, [&](auto m) { score_tile<m.value>(x, s.scratch, s.width, out, kTile); });
      for (int64_t m = 0; m < left; m++)
        for (int64_t n = 0; n < count; n++) s.y[(r + m) * s.y_stride + i + n] = out[m * kTile + n];
    }
  }
}

void dot_rows(const mh::HeadRows& s) {
  if (s.rows < 3)  // turning costs as much as a few rows
    for (int64_t r = 0; r < s.rows; r++) gemv(s.x + r * s.x_stride, s.w, s.is_bf16, s.n, s.width, s.y + r * s.y_stride);
  else
    s.is_bf16 ? dot_rows_of<uint16_t>(s) : dot_rows_of<float>(s);
}

}  // namespace
