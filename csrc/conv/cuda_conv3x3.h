// The fused 3x3 convolutions of the GPU on tensors; CPU builds have none of them.
#pragma once

#include <tuple>

#include "choose.h"

namespace ran {

#ifdef RAN_WITH_CUDA

inline bool is_3x3(const Tensor& weight) { return weight.size(2) == 3 && weight.size(3) == 3; }

// `product` for a channels_last 3x3 convolution of a shape that the kernels take, where they are the faster ones by
// measurement.
ConvChoice choose_cuda_conv3x3(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);
// Why there is no kernel, in words.
std::string describe_cuda_conv3x3(ConvPath path, ConvPass pass, const Tensor& x, const Tensor& weight,
                                  const Convolution& conv);

// y.out = conv(relu(bn(x))) + bias + residual, and the next statistics where they are wanted.
void cuda_conv3x3_forward(ConvOutput& y, const Tensor& x, const BatchNormArgs& bn, const Tensor& weight,
                          const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                          const NextStatistics& next);
// dz, the gradient of bn(x), and its sums.
std::tuple<Tensor, BackwardSums> cuda_conv3x3_dgrad(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn,
                                                    const Tensor& weight, const Convolution& conv);
// dweight, and dbias, undefined where it is not wanted.
std::tuple<Tensor, Tensor> cuda_conv3x3_wgrad(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn,
                                              const Tensor& weight, const Convolution& conv, bool want_bias);

#endif

}  // namespace ran
