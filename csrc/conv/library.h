// ATen's convolution and its derivative, around two faults of the library below it: with a stride far larger than the
// input oneDNN divides by 0, and the process ends.
//
// And oneDNN as torch 2.13 and 2.14 have it, on a processor with AVX2 and no AVX-512, writes beyond its workspace in
// the weight gradient of a channels_last 1x1 convolution with a stride and fewer than 8 input channels: it gathers the
// pixels that the stride reaches into a workspace that has no room for 8. Here these pixels are taken first, and a
// convolution of stride 1 follows. docs/upstream.md tells more.
//
// 16-bit tensors for which oneDNN has no kernels on this processor are convolved in float.
#pragma once

#include <array>
#include <tuple>

#include "../common/tensors.h"

namespace ran::library {

// Differentiable, as at::conv2d is.
Tensor conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, at::IntArrayRef stride,
              at::IntArrayRef padding);

// dx, dweight and dbias where `wanted`.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                                   std::array<bool, 3> wanted);

}  // namespace ran::library
