// The CPU's own convolutions of channels_last tensors. `path` is choose_conv's. In all three `bn` may be null: the
// convolution is then of x itself. `pieces`: where the values of x are, if x has none but only its sizes; in pointwise
// convolutions on ConvPath::product.
#pragma once

#include <tuple>

#include "choose.h"

namespace ran {

// y.out = conv(relu(bn(x))) + bias + residual, and the next statistics where they are wanted.
void cpu_conv_forward(ConvOutput& y, ConvPath path, const Tensor& x, const BatchNormArgs* bn, const Tensor& weight,
                      const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                      const NextStatistics& next, const Rows* pieces = nullptr);
// dz, the gradient of bn(x), and its sums; without bn that of x, and no sums.
std::tuple<Tensor, BackwardSums> cpu_conv_dgrad(ConvPath path, const Tensor& dy, const Tensor& x,
                                                const BatchNormArgs* bn, const Tensor& weight, const Convolution& conv,
                                                const Rows* pieces = nullptr);
// dweight, and dbias, undefined where it is not wanted.
std::tuple<Tensor, Tensor> cpu_conv_wgrad(ConvPath path, const Tensor& dy, const Tensor& x, const BatchNormArgs* bn,
                                          const Tensor& weight, const Convolution& conv, bool want_bias,
                                          const Rows* pieces = nullptr);

}  // namespace ran
