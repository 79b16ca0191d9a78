// Batch normalisation + ReLU decomposed into ATen's ops, on any device: for derivatives of derivatives, and for float64
// on a GPU.
#pragma once

#include "bn_relu.h"

namespace ran::decomposed {

// relu(bn(x)) with the batch's own statistics or those given; weight and bias may be undefined.
Tensor bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
               bool batch_stats, double eps);
BackwardSums bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn);
Tensor bn_relu_dx(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn, const BackwardSums* sums, double count);

}  // namespace ran::decomposed
