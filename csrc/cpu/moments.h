// Mean and variance of each channel, tile by tile.
//
// Two passes over a tile that fits a core's cache: the sum of its values, in double, then the deviations from its mean
// and their squares (the corrected two-pass algorithm: Chan, Golub and LeVeque 1983). Sums are exact for whole numbers,
// and infinities and NaN reach both moments as they do in torch. Nothing cancels, however large the mean is, at one
// read of memory.
#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

namespace ran::cpu::RAN_ISA {

// The sum of `count` terms, add(sum, i) each, in four runs: a quarter of the additions that a rounding error passes
// through, and no addition waits for the last.
template <typename Sum, typename Add>
inline Sum sum_in_runs(int64_t count, Add&& add) {
  constexpr int kRuns = 4;
  Sum total[kRuns] = {};
  int64_t i = 0;
  for (; i + kRuns <= count; i += kRuns)
    for (int run = 0; run < kRuns; ++run) add(total[run], i + run);
  for (int run = 0; i < count; ++i, ++run) add(total[run], i);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// The same of vectors, values(i): short runs in their own precision, these in double.
template <typename A, typename Values>
inline WideSum<A> wide_sum(int64_t count, Values&& values) {
  constexpr int64_t kShort = 32;
  WideSum<A> total;
  for (int64_t i = 0; i < count; i += kShort)
    total += sum_in_runs<Vec<A>>(std::min(kShort, count - i), [&](Vec<A>& s, int64_t at) { s += values(i + at); });
  return total;
}

// Two sums that grow together.
template <typename V>
struct Pair {
  V first, second;
  Pair operator+(const Pair& other) const { return {first + other.first, second + other.second}; }
};

template <typename V>
inline void add_deviation(Pair<V>& sums, V deviation) {
  sums.first += deviation;
  sums.second = fma(deviation, deviation, sums.second);
}

// What the deviations of a tile of n values are taken from, a point near its mean; `share` is 1 / n.
template <typename A>
inline A centre(double sum, double share) {
  return A(sum * share);
}

// tile [3][stride]: the sum, and the sums of the deviations from centre(sum) and of their squares; of columns
// [c, c + channels) of x, whose rows are `stride` values apart, over rows [row, row + rows).
template <typename T, typename A = Acc<T>>
void tile_moments(double* tile, const T* x, int64_t stride, int64_t row, int64_t rows, int64_t c, int64_t channels) {
  for_lanes<A>(channels, [&](int64_t i, int n) {
    const T* const column = x + row * stride + c + i;
    double* const sums = tile + c + i;
    const WideSum<A> total = wide_sum<A>(rows, [&](int64_t r) { return load(column + r * stride, n); });
    const Vec<A> about = (total * (1.0 / double(rows))).rounded();  // centre() of each lane
    const auto left = sum_in_runs<Pair<Vec<A>>>(
        rows, [&](Pair<Vec<A>>& s, int64_t r) { add_deviation(s, load(column + r * stride, n) - about); });
    total.store_to(sums, n);
    WideSum<A>(left.first).store_to(sums + stride, n);
    WideSum<A>(left.second).store_to(sums + 2 * stride, n);
  });
}

// The same of `size` values that follow one another; the three are `stride` apart.
template <typename T, typename A = Acc<T>>
void run_moments(double* sums, int64_t stride, const T* x, int64_t size) {
  constexpr int lanes = VecOf<A>::lanes;
  const int64_t whole = size / lanes;
  const int rest = int(size % lanes);
  auto total = wide_sum<A>(whole, [&](int64_t i) { return load(x + i * lanes); });
  if (rest) total += load(x + whole * lanes, rest);
  sums[0] = total.total();
  const Vec<A> about = splat(centre<A>(sums[0], 1.0 / double(size)));
  auto left = sum_in_runs<Pair<Vec<A>>>(
      whole, [&](Pair<Vec<A>>& s, int64_t i) { add_deviation(s, load(x + i * lanes) - about); });
  if (rest) add_deviation(left, first(load(x + whole * lanes, rest) - about, rest));
  sums[stride] = sum<A>(left.first);
  sums[2 * stride] = sum<A>(left.second);
}

// The moments of tiles [count][3][channels] as the two above leave them, tile t of size_of(t) values a channel; var is
// biased. `exact`: both once more, in double, mean before var; or null.
template <typename A, typename Size>
void merge_tiles(A* mean, A* var, double* exact, const double* tiles, int64_t count, int64_t channels, Size&& size_of) {
  std::vector<double> means(size_t(channels), 0.0), left(size_t(channels), 0.0), squares(size_t(channels), 0.0);
  int64_t size = 0;
  for (int64_t tile = 0; tile < count; ++tile) {
    size += size_of(tile);
    for (int64_t i = 0; i < channels; ++i) means[i] += tiles[tile * 3 * channels + i];
  }
  for (int64_t i = 0; i < channels; ++i) means[i] /= double(size);
  for (int64_t tile = 0; tile < count; ++tile) {
    const double* const p = tiles + tile * 3 * channels;
    const double n = double(size_of(tile)), share = 1.0 / n;
    for (int64_t i = 0; i < channels; ++i) {
      // About the whole's mean, from what is about a point near the tile's.
      const double d = double(centre<A>(p[i], share)) - means[i];
      left[i] += n * d + p[channels + i];
      squares[i] += p[2 * channels + i] + 2 * d * p[channels + i] + n * d * d;
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    const double correction = left[i] / double(size), variance = squares[i] / double(size) - correction * correction;
    const double kept = variance < 0 ? 0 : variance;  // NaN stays
    // Of a mean of many deviations the sum has lost digits that the deviations know; else it is the more exact.
    if (means[i] * means[i] > 64 * kept) means[i] += correction;
    mean[i] = A(means[i]);
    var[i] = A(kept);
    if (exact) exact[i] = means[i], exact[channels + i] = kept;
  }
}

}  // namespace ran::cpu::RAN_ISA
