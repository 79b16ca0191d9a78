// A convolution's arguments, and what goes in and out of the ops around it.
#pragma once

#include <array>

#include "../batch_norm/bn_relu.h"
#include "../common/asked.h"
#include "../cpu/kernels.h"

namespace ran {

inline constexpr const char* kBnReluConv2d = "bn_relu_conv2d";  // the op, in what the checks say

struct Convolution {
  at::IntArrayRef stride, padding;
  Asked asked;

  int64_t out_size(const Tensor& x, const Tensor& weight, int i) const {
    return (x.size(2 + i) + 2 * padding[i] - weight.size(2 + i)) / stride[i] + 1;
  }
  std::array<int64_t, 4> out_sizes(const Tensor& x, const Tensor& weight) const {
    return {x.size(0), weight.size(0), out_size(x, weight, 0), out_size(x, weight, 1)};
  }
  // As the CPU's kernels take it.
  cpu::ConvShape shape(const Tensor& x, const Tensor& weight) const;
};

// Raises unless there is such a convolution of x, and its sizes can be computed.
void check_convolution(const char* op, const Tensor& x, const Tensor& weight, const Convolution& conv);

// The normalisation before a convolution: the vectors, and the batch's or the given statistics.
struct PreActivation {
  OptTensor weight, bias;
  OptTensor mean, var;  // absent: the batch's own, to be computed
  Running running;      // updated where they are computed
  double eps;
};

// The batch normalisation that takes the output next.
struct NextStatistics {
  bool wanted;
  Running running;
};

struct ConvOutput {
  Tensor out, mean, var, next_mean, next_var;  // the statistics undefined where they were given or not wanted
};

struct ConvGradients {
  Tensor dx, dweight, dbias;
  BackwardSums sums;
};

// As the ops return them: dx, dbn_weight, dbn_bias, dweight, dbias; empty what was not wanted.
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
inline GradientTensors tensors_of(const ConvGradients& g, const Tensor& x) {
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, x.options()); };
  return {or_empty(g.dx), or_empty(g.sums.dz_xhat), or_empty(g.sums.dz), or_empty(g.dweight), or_empty(g.dbias)};
}

}  // namespace ran
