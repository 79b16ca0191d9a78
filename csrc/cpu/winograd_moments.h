// Mean and variance of a convolution's output, taken tile by tile while it is in registers.
//
// A tile's mean, the squares of the deviations from it, and Chan's merge (1983) with those of the block's earlier
// tiles: exact where a sum and a sum of squares would cancel. Means are kept as differences from one value near them,
// so that a large mean takes none of their digits.
#pragma once

#include <vector>

#include "winograd_tiles.h"

namespace ran::cpu::RAN_ISA {

// For each block of tiles [a value near the mean, the mean's difference from it, squares about the mean][channel].
class TileMoments {
 public:
  TileMoments(int64_t blocks, int64_t channels)
      : channels_(channels), blocks_(blocks), sums_(size_t(blocks * 3 * channels)) {}

  // y: a tile's outputs in `lanes` channels from c on, `before` pixels of the block having come before.
  template <int m>
  void add(const Vec<float> (&y)[m][m], const Place& place, int64_t before, int64_t c, int lanes, int64_t block) {
    float* const at = sums_.data() + block * 3 * channels_ + c;
    const float pixels = float(place.pixels()), whole = float(before) + pixels;
    const auto sum = [&](auto&& term) RAN_ALWAYS {
      Vec<float> rows[m] = {}, total{};
      for_pixels<m>(place, [&](int i, int j) RAN_ALWAYS { rows[i] += term(y[i][j]); });
      RAN_UNROLL for (int i = 0; i < m; ++i) total += rows[i];
      return total;
    };
    if (before == 0) store(at, sum([](Vec<float> v) { return v; }) * (1 / pixels), lanes);
    const Vec<float> near = load(at, lanes), mean = sum([&](Vec<float> v) { return v - near; }) * (1 / pixels);
    const Vec<float> squares = sum([&](Vec<float> v) { return ((v - near) - mean) * ((v - near) - mean); });
    const Vec<float> old = load(at + channels_, lanes), d = mean - old;
    store(at + channels_, before ? old + d * (pixels / whole) : mean, lanes);
    store(at + 2 * channels_, load(at + 2 * channels_, lanes) + squares + d * d * (float(before) * pixels / whole),
          lanes);
  }

  // pixels(block): how many it has. var is biased.
  template <typename Pixels>
  void finish(float* mean, float* var, Pixels&& pixels) const {
    double count = 0;
    std::vector<double> total(size_t(channels_), 0.0), squares(size_t(channels_), 0.0);
    for (int64_t block = 0; block < blocks_; ++block) {
      const double have = double(pixels(block)), share = have / (count + have), weight = count * share;
      const float* const at = sums_.data() + block * 3 * channels_;
      for (int64_t c = 0; c < channels_; ++c) {
        const double d = double(at[c]) + double(at[channels_ + c]) - total[size_t(c)];
        total[size_t(c)] += d * share;
        squares[size_t(c)] += double(at[2 * channels_ + c]) + d * d * weight;
      }
      count += have;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      mean[c] = float(total[size_t(c)]);
      var[c] = float(squares[size_t(c)] / count);
    }
  }

 private:
  int64_t channels_, blocks_;
  std::vector<float> sums_;
};

}  // namespace ran::cpu::RAN_ISA
