// One case of compare_gpu.cpp on one kind of numbers: makes the inputs and keeps the outputs.
#pragma once

#include "compare_device.h"
#include "dtypes.h"

namespace compare {

using check::bf16;
using check::f16;
using check::Type;

enum class Match { bits, rounding };  // of outputs from whole numbers; from others it is always rounding

template <typename T>
const char* dtype_name() {
  if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
  if constexpr (std::is_same_v<T, int64_t>) return "int64";
  if constexpr (!std::is_integral_v<T>) return Type<T>::name;
}

struct Run {
  const char* name;
  bool whole;  // the inputs are small integers
  FILE* file;

  // Numbers of [low, high], times `step`.
  template <typename T>
  Array<T> input(size_t count, double low, double high, double step = 1) const {
    std::vector<T> values(count);
    for (T& x : values) x = check::make<T>(step * check::value(check::random_number<T>(low, high, whole)));
    return Array<T>(values);
  }

  void launch(cudaError_t error) const { expect(name, error); }

  // `slack`: what may come of rounding before the output is rounded to its own dtype.
  template <typename T>
  void output(const char* what, const Array<T>& array, Match match, double slack) const {
    const std::vector<T> values = array.read();
    const bool exact = std::is_integral_v<T> || (whole && match == Match::bits);
    std::fprintf(file, "output %s %s %s %s %g %zu\n", whole ? "whole" : "random", what, dtype_name<T>(),
                 exact ? "bits" : "rounding", slack, values.size() * sizeof(T));
    std::fwrite(values.data(), sizeof(T), values.size(), file);
  }
};

// Of values of size `size` that are added up in float: 16 rounding errors.
inline double rounding(double size) { return size * 0x1p-20; }

}  // namespace compare
