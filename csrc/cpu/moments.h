// Mean and variance of the columns of a (rows, channels) tensor, tile by tile.
//
// Two passes over a tile that fits a core's cache: its mean, then the deviations from it, of which the second pass sums
// the values too. What is left of those is the rounding of the tile's mean, and corrects both moments (Chan, Golub and
// LeVeque 1983, the corrected two-pass algorithm). Exact where sum and sum of squares would cancel, at one read of
// memory.
#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

namespace ran::cpu::RAN_ISA {

// Column sums over the rows of a tile of K quantities that f(vector of x, row, channel, lanes) gives. Each is summed in
// four runs: a quarter of the additions that a rounding error passes through, and no addition waits for the last.
template <int K, typename A, typename F>
inline void tile_sums(A* out, int64_t out_stride, int64_t row, int64_t rows, int64_t c, int64_t channels, F&& f) {
  constexpr int kRuns = 4;
  for_lanes<A>(channels, [&](int64_t i, int n) {
    Vec<A> total[kRuns][K] = {};
    int64_t r = 0;
    for (; r + kRuns <= rows; r += kRuns)
      for (int run = 0; run < kRuns; ++run) f(total[run], row + r + run, c + i, n);
    for (int run = 0; r < rows; ++r, ++run) f(total[run], row + r, c + i, n);
    for (int k = 0; k < K; ++k)
      store(out + k * out_stride + c + i, (total[0][k] + total[1][k]) + (total[2][k] + total[3][k]), n);
  });
}

// tile [3][stride]: mean, sum of deviations from it, sum of their squares; of columns [c, c + channels) of x, whose
// rows are `stride` values apart, over rows [row, row + rows).
template <typename T, typename A = Acc<T>>
void tile_moments(A* tile, const T* x, int64_t stride, int64_t row, int64_t rows, int64_t c, int64_t channels) {
  tile_sums<1>(tile, 0, row, rows, c, channels,
               [&](Vec<A>* s, int64_t r, int64_t i, int n) { s[0] += load(x + r * stride + i, n); });
  for (int64_t i = c; i < c + channels; ++i) tile[i] /= A(rows);
  tile_sums<2>(tile + stride, stride, row, rows, c, channels, [&](Vec<A>* s, int64_t r, int64_t i, int n) {
    const Vec<A> d = load(x + r * stride + i, n) - load(tile + i, n);
    s[0] += d;
    s[1] = fma(d, d, s[1]);
  });
}

// Chan's merge of all tiles of `tile_rows` rows (the last may have fewer) at once: the mean of the means, then the
// squares within the tiles and between them. var is biased.
template <typename A>
void merge_tiles(A* mean, A* var, const A* tiles, int64_t tile_rows, int64_t rows, int64_t channels) {
  const int64_t count = (rows + tile_rows - 1) / tile_rows;
  const auto rows_of = [&](int64_t tile) { return double(std::min(tile_rows, rows - tile * tile_rows)); };
  std::vector<double> total(size_t(channels), 0.0), m2(size_t(channels), 0.0);
  for (int64_t tile = 0; tile < count; ++tile) {
    const A* const p = tiles + tile * 3 * channels;
    for (int64_t i = 0; i < channels; ++i) total[i] += rows_of(tile) * double(p[i]) + double(p[channels + i]);
  }
  for (int64_t i = 0; i < channels; ++i) total[i] /= double(rows);
  for (int64_t tile = 0; tile < count; ++tile) {
    const A* const p = tiles + tile * 3 * channels;
    for (int64_t i = 0; i < channels; ++i) {
      // The sum of squares about the whole's mean, from that about a point p[i] near the tile's mean.
      const double d = double(p[i]) - total[i], deviations = double(p[channels + i]);
      m2[i] += double(p[2 * channels + i]) + 2 * d * deviations + rows_of(tile) * d * d;
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    mean[i] = A(total[i]);
    var[i] = A(std::max(0.0, m2[i] / double(rows)));
  }
}

}  // namespace ran::cpu::RAN_ISA
