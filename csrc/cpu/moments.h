// Mean and variance of each channel, tile by tile.
//
// Two passes over a tile that fits a core's cache: the sum of its values, in double, then the squares of their
// deviations from its mean. Sums are exact for whole numbers, and infinities and NaN reach both moments as they do in
// torch. Nothing cancels, however large the mean is, at one read of memory.
#pragma once

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

// Two sums that grow together.
template <typename V>
struct Pair {
  V first, second;
  Pair operator+(const Pair& other) const { return {first + other.first, second + other.second}; }
};

// What the squares of a tile of `count` values are taken about.
template <typename A>
inline A centre(double sum, int64_t count) {
  return A(sum / double(count));
}

// tile [2][stride]: the sum, and the squares of the deviations from centre(sum, rows); of columns [c, c + channels) of
// x, whose rows are `stride` values apart, over rows [row, row + rows).
template <typename T, typename A = Acc<T>>
void tile_moments(double* tile, const T* x, int64_t stride, int64_t row, int64_t rows, int64_t c, int64_t channels) {
  for_lanes<A>(channels, [&](int64_t i, int n) {
    const T* const column = x + row * stride + c + i;
    double* const sums = tile + c + i;
    sum_in_runs<WideSum<A>>(rows, [&](WideSum<A>& s, int64_t r) {
      s += load(column + r * stride, n);
    }).store_to(sums, n);
    Vec<A> about{};
    for (int lane = 0; lane < n; ++lane) about[lane] = centre<A>(sums[lane], rows);
    const Vec<A> squares = sum_in_runs<Vec<A>>(rows, [&](Vec<A>& s, int64_t r) {
      const Vec<A> d = load(column + r * stride, n) - about;
      s = fma(d, d, s);
    });
    for (int lane = 0; lane < n; ++lane) sums[stride + lane] = double(squares[lane]);
  });
}

// The same of `size` values that follow one another.
template <typename T, typename A = Acc<T>>
void run_moments(double* sum_out, double* squares_out, const T* x, int64_t size) {
  constexpr int lanes = VecOf<A>::lanes;
  const int64_t whole = size / lanes;
  const int rest = int(size % lanes);
  auto total = sum_in_runs<WideSum<A>>(whole, [&](WideSum<A>& s, int64_t i) { s += load(x + i * lanes); });
  if (rest) total += load(x + whole * lanes, rest);
  *sum_out = total.total();
  const Vec<A> about = splat(centre<A>(*sum_out, size));
  Vec<A> squares = sum_in_runs<Vec<A>>(whole, [&](Vec<A>& s, int64_t i) {
    const Vec<A> d = load(x + i * lanes) - about;
    s = fma(d, d, s);
  });
  if (rest) {
    const Vec<A> d = first(load(x + whole * lanes, rest) - about, rest);
    squares = fma(d, d, squares);
  }
  *squares_out = sum<A>(squares);
}

// The moments of tiles [count][2][channels] as the two above leave them, tile t of size_of(t) values a channel; var is
// biased. `exact`: both once more, in double, mean before var; or null.
template <typename A, typename Size>
void merge_tiles(A* mean, A* var, double* exact, const double* tiles, int64_t count, int64_t channels, Size&& size_of) {
  std::vector<double> centres(size_t(channels), 0.0), squares(size_t(channels), 0.0);
  int64_t size = 0;
  for (int64_t tile = 0; tile < count; ++tile) {
    size += size_of(tile);
    for (int64_t i = 0; i < channels; ++i) centres[i] += tiles[tile * 2 * channels + i];
  }
  for (int64_t i = 0; i < channels; ++i) centres[i] /= double(size);
  for (int64_t tile = 0; tile < count; ++tile) {
    const double* const p = tiles + tile * 2 * channels;
    const double n = double(size_of(tile));
    for (int64_t i = 0; i < channels; ++i) {
      // The squares about the whole's mean, from those about a point near the tile's.
      const double about = double(centre<A>(p[i], size_of(tile))), d = about - centres[i];
      squares[i] += p[channels + i] + 2 * d * (p[i] - n * about) + n * d * d;
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    const double variance = squares[i] / double(size), kept = variance < 0 ? 0 : variance;  // NaN stays
    mean[i] = A(centres[i]);
    var[i] = A(kept);
    if (exact) exact[i] = centres[i], exact[channels + i] = kept;
  }
}

}  // namespace ran::cpu::RAN_ISA
