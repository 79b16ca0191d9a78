// The ops in ATen's own, on any device: for derivatives of derivatives, and for float64 on a GPU, which has no kernels.
#pragma once

#include <tuple>

#include "bn_relu.h"

namespace ran::composed {

// Whether x, of a dtype that the ops take, has no kernels on its device.
inline bool needed(const Tensor& x) { return x.is_cuda() && x.scalar_type() == at::kDouble; }

Tensor attention_gate(const Tensor& trunk, const Tensor& mask, int64_t scale);
// dtrunk and dmask.
std::tuple<Tensor, Tensor> attention_gate_backward(const Tensor& dout, const Tensor& trunk, const Tensor& mask,
                                                   int64_t scale);

// skip may be undefined.
Tensor upsample_add(const Tensor& lower, const Tensor& skip, int64_t height, int64_t width);
Tensor upsample_add_backward(const Tensor& dout);  // dlower

// out and index; the derivative is differentiable in dout.
std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x);
Tensor max_pool2d_backward(const Tensor& dout, const Tensor& index, int64_t height, int64_t width);

// relu(bn(x)) with the batch's own statistics or those given; weight and bias may be undefined.
Tensor bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
               bool batch_stats, double eps);
BackwardSums bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn);
Tensor bn_relu_dx(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn, const BackwardSums* sums, double count);

}  // namespace ran::composed
