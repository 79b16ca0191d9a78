// Ops decomposed into ATen's, on any device: for derivatives of derivatives, and for float64 on a GPU. Batch
// normalisation's are in batch_norm/decomposed.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace ran::decomposed {

Tensor attention_gate(const Tensor& trunk, const Tensor& mask, int64_t scale, bool bilinear = false);
// dtrunk and dmask.
std::tuple<Tensor, Tensor> attention_gate_backward(const Tensor& dout, const Tensor& trunk, const Tensor& mask,
                                                   int64_t scale, bool bilinear = false);

// skip may be undefined.
Tensor upsample_add(const Tensor& lower, const Tensor& skip, int64_t height, int64_t width);
Tensor upsample_add_backward(const Tensor& dout);  // dlower

// out and index; the derivative is differentiable in dout.
std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x);
Tensor max_pool2d_backward(const Tensor& dout, const Tensor& index, int64_t height, int64_t width);

}  // namespace ran::decomposed
