// The 1x1 convolutions in double, one loop a formula, with the rounding points of the kernels: relu(bn(x)) and every
// tensor are rounded to 16 bits, sums over the outputs are of what is stored.
#pragma once

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "conv1x1.h"
#include "math.h"
#include "vec.cuh"

namespace conv1x1_test {

using namespace ran;
using namespace ran::cuda;

inline int failures = 0;

// Numbers for one tensor: small integers, so that every sum is exact, or normal ones.
struct Generator {
  std::mt19937 engine;
  bool integers;
  float next(float scale = 1.0f) {
    if (integers) return static_cast<float>(static_cast<int>(engine() % 5) - 2);
    return scale * std::normal_distribution<float>()(engine);
  }
};

template <typename T>
std::vector<double> to_double(const emu::Buffer<T>& buffer) {
  std::vector<double> out(buffer.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = to_float(buffer[i]);
  return out;
}

template <typename T>
struct Filled : emu::Buffer<T> {
  Filled(int64_t count, Generator& numbers, float scale = 1.0f) : emu::Buffer<T>(count) {
    for (int64_t i = 0; i < count; ++i) (*this)[i] = from_float<T>(numbers.next(scale));
  }
};

// Per-channel vectors of a batch normalisation. For integers the standard deviation is 1, so that z is an integer.
struct Norm {
  emu::Buffer<float> mean, var, weight, bias;
  double eps;

  Norm(int channels, Generator& numbers, float shift)
      : mean(channels), var(channels), weight(channels), bias(channels), eps(numbers.integers ? 0.0 : 1e-5) {
    for (int c = 0; c < channels; ++c) {
      mean[c] = numbers.next();
      var[c] = numbers.integers ? 1.0f : 0.5f + numbers.engine() % 8 * 0.25f;
      weight[c] = numbers.next();
      bias[c] = numbers.next() + shift;
    }
  }
  BatchNorm<float> view() const { return {mean.data(), var.data(), weight.data(), bias.data(), eps}; }
  ScaleShift<float> at(int c) const {
    return scale_shift(mean[c], var[c], weight[c], bias[c], static_cast<float>(eps));
  }
};

// Row of x that an output row reads.
inline int64_t source_row(const Conv1x1Shape& s, int64_t row) {
  const int64_t x = row % s.out_w(), y = row / s.out_w() % s.out_h(), image = row / (s.out_w() * s.out_h());
  return (image * s.h + y * s.stride) * s.w + x * s.stride;
}

// relu(bn(x)) as the product sees it, (rows, c_in); norm null: x itself.
template <typename T>
std::vector<double> activation(const Conv1x1Shape& s, const T* x, const Norm* norm) {
  std::vector<double> a(s.rows() * s.c_in);
  for (int64_t row = 0; row < s.rows(); ++row)
    for (int64_t c = 0; c < s.c_in; ++c) {
      const T value = x[source_row(s, row) * s.c_in + c];
      const float z = norm ? relu(normalise(to_float(value), norm->at(static_cast<int>(c)))) : to_float(value);
      a[row * s.c_in + c] = norm ? to_float(from_float<T>(z)) : z;
    }
  return a;
}

// A sum and the sum of its terms' magnitudes, which the error of a float sum is measured by.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) { value += term, magnitude += std::fabs(term); }
};

// sums[i][j] = sum over k of a[i][k] * b[k][j], any strides.
struct View {
  const std::vector<double>& data;
  int64_t row_stride, column_stride;
  double at(int64_t i, int64_t j) const { return data[i * row_stride + j * column_stride]; }
};
inline std::vector<Sum> multiply(View a, View b, int64_t rows, int64_t depth, int64_t columns) {
  std::vector<Sum> sums(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j) sums[i * columns + j].add(a.at(i, k) * b.at(k, j));
  return sums;
}

// Half a unit in the last place of a number of size 1.
template <typename T>
constexpr double roundoff() {
  return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, f16> ? 0x1p-11 : 0x1p-8;
}

// `exact`: the bits of the correctly rounded sum are wanted; else an error within one rounding and that of a float sum.
template <typename T>
void expect(const std::string& what, const emu::Buffer<T>& got, const std::vector<Sum>& want, bool exact) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double value = to_float(got[i]), reference = want[i].value;
    if (std::isnan(value) && std::isnan(reference)) continue;
    const double rounded = to_float(from_float<T>(static_cast<float>(reference)));
    const double tolerance = std::fabs(reference) * roundoff<T>() * 1.01 + want[i].magnitude * 1e-6 + 0x1p-25;
    const bool good = exact ? value == rounded : std::fabs(value - reference) <= tolerance;
    if (good) continue;
    ++failures;
    std::printf("FAIL %s [%zu]: got %.9g, want %.9g (tolerance %.3g)\n", what.c_str(), i, value, reference,
                exact ? 0.0 : tolerance);
    return;
  }
}

// Mean and variance of the columns of `values` (rows, columns) against what the kernel says.
inline void expect_statistics(const std::string& what, const std::vector<double>& values, int64_t columns,
                              const emu::Buffer<float>& mean, const emu::Buffer<float>& var) {
  const int64_t rows = static_cast<int64_t>(values.size()) / columns;
  std::vector<Sum> means(columns), vars(columns);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) means[c].add(values[r * columns + c] / rows);
    for (int64_t r = 0; r < rows; ++r) vars[c].add(std::pow(values[r * columns + c] - means[c].value, 2) / rows);
    vars[c].magnitude += std::fabs(means[c].value) * std::sqrt(vars[c].value);
  }
  expect(what + " mean", mean, means, false);
  expect(what + " var", var, vars, false);
}

}  // namespace conv1x1_test
