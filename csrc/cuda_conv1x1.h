// The fused 1x1 convolutions of the GPU on tensors; CPU builds have none of them.
#pragma once

#include <tuple>

#include "bn_relu.h"

namespace ran {

enum class ConvPass { forward, dgrad, wgrad };

#ifdef RAN_WITH_CUDA

// Whether a pass of the convolution of x, (N, C, H, W) dense, runs on the fused kernel: on a GPU, channels_last, 1x1 at
// stride 1 without padding, of a shape that the kernel takes and for which it is chosen (cuda_dispatch.h).
bool use_cuda_conv1x1(ConvPass pass, const Tensor& x, const Tensor& weight, at::IntArrayRef stride,
                      at::IntArrayRef padding);

// conv(relu(bn(x))) + bias + residual.
Tensor cuda_conv1x1_forward(const Tensor& x, const BatchNormArgs& bn, const Tensor& weight, const OptTensor& bias,
                            const OptTensor& residual);
// dz, the gradient of bn(x), and its sums.
std::tuple<Tensor, BackwardSums> cuda_conv1x1_dgrad(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn,
                                                    const Tensor& weight);
// dweight, and dbias, undefined where it is not wanted.
std::tuple<Tensor, Tensor> cuda_conv1x1_wgrad(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn,
                                              const Tensor& weight, bool want_bias);

#endif

}  // namespace ran
