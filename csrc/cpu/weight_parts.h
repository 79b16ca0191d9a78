// The gradient of a convolution's weight and bias that several parts of the work add to.
#pragma once

#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {

// For each part dweight and dbias, float, one after the other.
class WeightParts {
 public:
  WeightParts(int64_t parts, int64_t weight, int64_t bias)
      : parts_(parts), weight_(weight), bias_(bias), sums_(parts * (weight + bias)) {}

  float* dweight(int64_t part) const { return sums_.get() + part * (weight_ + bias_); }
  float* dbias(int64_t part) const { return dweight(part) + weight_; }

  // The parts' sums, in order; dbias may be null.
  template <typename T>
  void add_up(T* dweight, float* dbias) const {
    parallel_for(0, divide_up(weight_, kLanes), 4096, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kLanes;
      for_lanes<float>(std::min(weight_, end * kLanes) - first,
                       [&](int64_t i, int lanes) { store(dweight + first + i, sum_at(first + i, lanes), lanes); });
    });
    if (dbias)
      for_lanes<float>(bias_, [&](int64_t i, int lanes) { store(dbias + i, sum_at(weight_ + i, lanes), lanes); });
  }

 private:
  Vec<float> sum_at(int64_t i, int lanes) const {
    Vec<float> total = load(sums_.get() + i, lanes);
    for (int64_t part = 1; part < parts_; ++part) total += load(dweight(part) + i, lanes);
    return total;
  }

  const int64_t parts_, weight_, bias_;
  const Scratch<float> sums_;
};

}  // namespace ran::cpu::RAN_ISA
