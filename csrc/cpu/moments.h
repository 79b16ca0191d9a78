// Mean and variance of each channel, tile by tile.
//
// Two passes over a tile that fits a core's cache: the sum of its values, in double, then the deviations from its mean
// and their squares (the corrected two-pass algorithm: Chan, Golub and LeVeque 1983). Sums are exact for whole numbers,
// and infinities and NaN reach both moments as they do in torch. Nothing cancels, however large the mean is, at one
// read of memory.
#pragma once

#include <algorithm>
#include <vector>

#include "wide_sum.h"

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

template <typename V>
inline void add_deviation(Pair<V>& sums, V deviation) {
  sums.first += deviation;
  sums.second = fma(deviation, deviation, sums.second);
}

// What the deviations of a tile of `count` values are taken from. Its mean, but 0 where that is infinite or NaN: then
// the deviations' sum is.
template <typename A>
inline A centre(double sum, int64_t count) {
  const A mean = A(sum / double(count));
  return mean - mean == 0 ? mean : A(0);
}

// The sum of a tile's deviations from `near`: of floats, whose sum in double has lost nothing, what that leaves; of
// doubles their own.
template <typename A>
inline double deviations_of(double sum, A near, int64_t count, A deviations) {
  return sizeof(A) == sizeof(double) ? double(deviations) : sum - double(near) * double(count);
}

// tile [3][stride]: a value near the mean, and the sums of the deviations from it and of their squares; of columns
// [c, c + channels) of x, whose rows are `stride` values apart, over rows [row, row + rows).
template <typename T, typename A = Acc<T>>
void tile_moments(double* tile, const T* x, int64_t stride, int64_t row, int64_t rows, int64_t c, int64_t channels) {
  for_lanes<A>(channels, [&](int64_t i, int n) {
    const T* const column = x + row * stride + c + i;
    double* const near = tile + c + i;
    double* const sums = near + stride;
    sum_in_runs<WideSum<A>>(rows, [&](WideSum<A>& s, int64_t r) {
      s += load(column + r * stride, n);
    }).store_to(sums, n);
    Vec<A> about{};
    for (int lane = 0; lane < n; ++lane) about[lane] = centre<A>(sums[lane], rows);
    const auto left = sum_in_runs<Pair<Vec<A>>>(
        rows, [&](Pair<Vec<A>>& s, int64_t r) { add_deviation(s, load(column + r * stride, n) - about); });
    for (int lane = 0; lane < n; ++lane) {
      near[lane] = double(about[lane]);
      sums[lane] = deviations_of<A>(sums[lane], about[lane], rows, left.first[lane]);
      sums[stride + lane] = double(left.second[lane]);
    }
  });
}

// The same of `size` values that follow one another; the three are `stride` apart.
template <typename T, typename A = Acc<T>>
void run_moments(double* tile, int64_t stride, const T* x, int64_t size) {
  constexpr int lanes = VecOf<A>::lanes;
  const int64_t whole = size / lanes;
  const int rest = int(size % lanes);
  auto sum = sum_in_runs<WideSum<A>>(whole, [&](WideSum<A>& s, int64_t i) { s += load(x + i * lanes); });
  if (rest) sum += load(x + whole * lanes, rest);
  const double total = sum.total();
  const A near = centre<A>(total, size);
  const Vec<A> about = splat(near);
  constexpr int64_t kShort = 64;  // vectors: squares are of one sign, and a long sum of them loses digits
  WideSum<A> deviations, squares;
  const auto add = [&](const Pair<Vec<A>>& part) { deviations += part.first, squares += part.second; };
  for (int64_t begin = 0; begin < whole; begin += kShort)
    add(sum_in_runs<Pair<Vec<A>>>(std::min(kShort, whole - begin), [&](Pair<Vec<A>>& s, int64_t i) {
      add_deviation(s, load(x + (begin + i) * lanes) - about);
    }));
  if (rest) {
    Pair<Vec<A>> last{};
    add_deviation(last, first(load(x + whole * lanes, rest) - about, rest));
    add(last);
  }
  tile[0] = double(near);
  tile[stride] = deviations_of<A>(total, near, size, A(deviations.total()));
  tile[2 * stride] = squares.total();
}

// The same of a block of a matrix whose columns come a few rows at a time, while they are in registers: deviations are
// taken from the mean of the first of them.
class BlockMoments {
 public:
  // How many doubles it works in.
  static int64_t scratch(int64_t channels) { return 2 * round_up(channels, kLanes); }
  BlockMoments(double* scratch, int64_t channels)
      : deviations_(scratch),
        near_(reinterpret_cast<float*>(scratch + round_up(channels, kLanes))),
        squares_(near_ + round_up(channels, kLanes)) {}

  // value(row), of `rows` rows of columns [c, c + lanes), the first of the block where `begins`.
  template <typename Value>
  void add(int rows, int64_t c, int lanes, bool begins, Value&& value) {
    Vec<float> about{}, squares{};
    WideSum<float> deviations;
    if (begins) {
      for (int r = 0; r < rows; ++r) about += value(r);
      about *= 1.0f / float(rows);
      about = about - about == 0 ? about : Vec<float>{};
      store(near_ + c, about, lanes);
    } else {
      about = load(near_ + c, lanes), squares = load(squares_ + c, lanes);
      deviations = WideSum<float>::at(deviations_ + c);
    }
    Pair<Vec<float>> sums{};  // of these rows: short sums round less
    for (int r = 0; r < rows; ++r) add_deviation(sums, value(r) - about);
    deviations += sums.first;
    deviations.store_to(deviations_ + c, kLanes);
    store(squares_ + c, squares + sums.second, lanes);
  }

  // tile [3][channels], as above.
  void leave(double* tile, int64_t channels) const {
    for (int64_t c = 0; c < channels; ++c) {
      tile[c] = double(near_[c]);
      tile[channels + c] = deviations_[c];
      tile[2 * channels + c] = double(squares_[c]);
    }
  }

 private:
  double* deviations_;
  float *near_, *squares_;
};

// The moments of tiles [count][3][channels] as those above leave them, tile t of size_of(t) values a channel; var is
// biased. `exact`: both once more, in double, mean before var; or null.
template <typename A, typename Size>
void merge_tiles(A* mean, A* var, double* exact, const double* tiles, int64_t count, int64_t channels, Size&& size_of) {
  std::vector<double> means(size_t(channels), 0.0), squares(size_t(channels), 0.0);
  int64_t size = 0;
  for (int64_t tile = 0; tile < count; ++tile) {
    const double* const p = tiles + tile * 3 * channels;
    const int64_t of_tile = size_of(tile);
    size += of_tile;
    for (int64_t i = 0; i < channels; ++i) means[i] += p[i] * double(of_tile) + p[channels + i];
  }
  for (int64_t i = 0; i < channels; ++i) means[i] /= double(size);
  for (int64_t tile = 0; tile < count; ++tile) {
    const double* const p = tiles + tile * 3 * channels;
    for (int64_t i = 0; i < channels; ++i) {
      // The squares about the whole's mean, from those about a point near the tile's.
      const double d = p[i] - means[i];
      squares[i] += p[2 * channels + i] + 2 * d * p[channels + i] + double(size_of(tile)) * d * d;
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    const double variance = squares[i] / double(size), kept = variance < 0 ? 0 : variance;  // NaN stays
    mean[i] = A(means[i]);
    var[i] = A(kept);
    if (exact) exact[i] = means[i], exact[channels + i] = kept;
  }
}

}  // namespace ran::cpu::RAN_ISA
