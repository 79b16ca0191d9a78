// The ways that conv(relu(bn(x))) and its gradients can take, and the choice between them.
#pragma once

#include <array>
#include <string>

#include "bn_relu.h"

namespace ran {

struct Convolution {
  at::IntArrayRef stride, padding;

  int64_t out_size(const Tensor& x, const Tensor& weight, int i) const {
    return (x.size(2 + i) + 2 * padding[i] - weight.size(2 + i)) / stride[i] + 1;
  }
};

// Raises unless there is such a convolution of x, and its sizes can be computed.
void check_convolution(const Tensor& x, const Tensor& weight, const Convolution& conv);

enum class ConvPass { forward, dgrad, wgrad, gate };  // gate: the forward pass with the attention gate behind it

// What a pass runs on: "fused" (a kernel of this library's own) or "library" (ATen's convolution, with one fused pass
// of BN-ReLU), and the reason in words.
struct ConvWay {
  bool fused;
  std::string why;
};
ConvWay conv_way(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);
// The same of a 1x1 convolution and the gate that takes its output: "fused" is one kernel for both.
ConvWay conv_gate_way(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale);

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
ConvOutput conv_forward(const Tensor& x, const PreActivation& norm, const Tensor& weight, const OptTensor& bias,
                        const OptTensor& residual, const Convolution& conv, const NextStatistics& next);

struct ConvGradients {
  Tensor dx, dweight, dbias;
  BackwardSums sums;
};
// `residual`: the gradient that reaches x on another way, added to dx; undefined where there is none. `wanted`: dx
// (with the sums), dweight, dbias; the others stay undefined.
ConvGradients conv_backward(const Tensor& dout, const Tensor& x, const Tensor& residual, const BatchNormArgs& bn,
                            bool batch_stats, const Tensor& weight, const Convolution& conv,
                            std::array<bool, 3> wanted);

}  // namespace ran
