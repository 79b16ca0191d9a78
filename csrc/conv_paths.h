// The ways that conv(relu(bn(x))) and its gradients can take, and the choice between them.
#pragma once

#include <array>
#include <string>
#include <tuple>

#include "bn_relu.h"

namespace ran {

// The user's choice for 3x3 convolutions on the CPU, in the order of ran_ext.set_conv3x3's names.
enum class Conv3x3Mode : int64_t { fast, strict, library };
Conv3x3Mode conv3x3_mode(const char* op, int64_t mode);

struct Convolution {
  at::IntArrayRef stride, padding;
  Conv3x3Mode mode = Conv3x3Mode::fast;

  int64_t out_size(const Tensor& x, const Tensor& weight, int i) const {
    return (x.size(2 + i) + 2 * padding[i] - weight.size(2 + i)) / stride[i] + 1;
  }
};

// Raises unless there is such a convolution of x, and its sizes can be computed.
void check_convolution(const char* op, const Tensor& x, const Tensor& weight, const Convolution& conv);

// What a pass runs on: "fused" (a kernel of this library's own) or "library" (ATen's convolution, with one fused pass
// of BN-ReLU), and the reason in words.
struct ConvWay {
  bool fused;
  std::string why;
};
// The Winograd kernel that a pass of a 3x3 convolution of a CPU tensor takes, or `library`.
cpu::Conv3x3 conv3x3_kernel(ConvPass pass, DType dtype, const cpu::ConvShape& shape, Conv3x3Mode mode);
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

// A convolution alone: 3x3 ones of a channels_last tensor on the CPU by Winograd's method where that pays.
cpu::Conv3x3 plain_kernel(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);
Tensor plain_conv_forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Convolution& conv);
// dx, dweight and dbias where `wanted`, the others undefined.
std::tuple<Tensor, Tensor, Tensor> plain_conv_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                       const Convolution& conv, std::array<bool, 3> wanted);

}  // namespace ran
