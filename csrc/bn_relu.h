// Batch normalisation + ReLU on dense tensors, as bn_relu.cpp and bn_relu_conv.cpp share it.
#pragma once

#include <tuple>

#include "torch_glue.h"

namespace ran {

// The per-channel vectors of one call in the kernels' precision, kept alive; `kernel` points into them.
struct BatchNormArgs {
  BatchNormArgs(const char* op, const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& mean,
                const Tensor& var, double eps);
  Tensor weight, bias, mean, var;  // weight and bias may be undefined
  BatchNorm<void> kernel;
};

// Raises unless x is (N, C, H, W) of a dtype that the kernels take; else x, dense.
Tensor dense_activation(const char* op, const Tensor& x);

// `dout` in the memory format of the dense tensor `like`, whose shape and dtype it must have.
Tensor gradient_like(const char* op, const Tensor& dout, const Tensor& like);

// Mean and biased variance of each channel.
std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x);

// relu(bn(x)), x dense.
Tensor bn_relu_apply(const Tensor& x, const BatchNormArgs& bn);

struct BackwardSums {
  Tensor dz, dz_xhat;  // sums over a channel: the gradients of BN's bias and weight
};
BackwardSums bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn);

// dx for batch statistics over `count` values a channel, or, without sums, for given statistics. dx may be dout on the
// CPU.
void bn_relu_dx(Tensor& dx, const Tensor& dout, const Tensor& x, const BatchNormArgs& bn, const BackwardSums* sums,
                double count);

}  // namespace ran
