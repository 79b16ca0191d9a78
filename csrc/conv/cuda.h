// The fused 1x1 and 3x3 convolutions of the GPU on tensors; CPU builds have none of them.
#pragma once

#include <tuple>

#include "choose.h"

namespace ran {

#ifdef RAN_WITH_CUDA

// `product` for a channels_last convolution of a shape that the kernels take, where they were asked for or are the
// faster ones by measurement.
ConvChoice choose_cuda_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);
// The same of the gate in the 1x1 forward kernel's epilogue.
ConvChoice choose_cuda_conv_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale,
                                 const Asked& asked);
// Why there is no kernel, in words.
std::string describe_cuda_conv(ConvPath path, ConvPass pass, const Tensor& x, const Tensor& weight,
                               const Convolution& conv);

// Whether the 1x1 kernels read these pieces of an x that itself has but its sizes.
bool cuda_conv_reads_pieces(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                            const Rows& pieces);

// y.out = conv(relu(bn(x))) + bias + residual, and the next statistics where they are wanted.
void cuda_conv_forward(ConvOutput& y, const Tensor& x, const BatchNormArgs& bn, const Tensor& weight,
                       const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                       const NextStatistics& next, const Rows* pieces = nullptr);
// The gated trunk, and the mask that gates it: conv(x) + bias.
std::tuple<Tensor, Tensor> cuda_conv_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight,
                                          const OptTensor& bias, int64_t scale);
// dz, the gradient of bn(x), and its sums.
std::tuple<Tensor, BackwardSums> cuda_conv_dgrad(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn,
                                                 const Tensor& weight, const Convolution& conv,
                                                 const Rows* pieces = nullptr);
// dweight, and dbias, undefined where it is not wanted.
std::tuple<Tensor, Tensor> cuda_conv_wgrad(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn,
                                           const Tensor& weight, const Convolution& conv, bool want_bias,
                                           const Rows* pieces = nullptr);

#endif

}  // namespace ran
