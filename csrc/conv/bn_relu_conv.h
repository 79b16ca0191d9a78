// conv(relu(bn(x))) + bias + residual and its gradients, each pass on the path that is chosen for it.
#pragma once

#include "convolution.h"

namespace ran {

ConvOutput bn_relu_conv_forward(const Tensor& x, const PreActivation& norm, const Tensor& weight, const OptTensor& bias,
                                const OptTensor& residual, const Convolution& conv, const NextStatistics& next,
                                const Rows* pieces = nullptr);

// `residual`: the gradient that reaches x by another path, added to dx; undefined where there is none. `wanted`: dx
// (with the sums), dweight, dbias; the others stay undefined.
ConvGradients bn_relu_conv_backward(const Tensor& dout, const Tensor& x, const Tensor& residual,
                                    const BatchNormArgs& bn, bool batch_stats, const Tensor& weight,
                                    const Convolution& conv, std::array<bool, 3> wanted, const Rows* pieces = nullptr);

// Whether a pass reads x in pieces, x itself having but its sizes; then `pieces` above may be given.
bool conv_reads_pieces(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                       const Rows& pieces);

// The same with no normalisation: conv(x) + bias; dx, dweight and dbias where `wanted`, the others undefined.
Tensor conv_forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Convolution& conv);
ConvGradients conv_backward(const Tensor& dout, const Tensor& x, const Tensor& weight, const Convolution& conv,
                            std::array<bool, 3> wanted);

}  // namespace ran
