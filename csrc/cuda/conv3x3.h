// 3x3 convolutions of channels_last tensors as matrix products, with the batch normalisation, ReLU, residual and
// statistics around them fused in. bf16 or fp16 tensors, fp32 accumulation and vectors. No torch here.
#pragma once

#include <string>

#include "conv_args.h"

namespace ran::cuda {

// x is (n, h, w, c_in), the weight (c_out, 3, 3, c_in), y (n, out_h, out_w, c_out), all dense. What lies outside x is 0
// behind the ReLU.
struct Conv3x3Shape {
  int64_t n, h, w, c_in, c_out;
  int stride, padding;
  int64_t out_h() const { return (h + 2 * padding - 3) / stride + 1; }
  int64_t out_w() const { return (w + 2 * padding - 3) / stride + 1; }
  int64_t rows() const { return n * out_h() * out_w(); }
};

using Conv3x3Forward = ConvForward<Conv3x3Shape>;
using Conv3x3Dgrad = ConvDgrad<Conv3x3Shape>;
using Conv3x3Wgrad = ConvWgrad<Conv3x3Shape>;

// As the 1x1 convolutions' functions. The workspace holds sums a channel or a weight, and no pixel.
bool conv3x3_supported(ConvPass pass, const Conv3x3Shape& shape, DType dtype, std::string* why);
size_t conv3x3_workspace(ConvPass pass, const Conv3x3Shape& shape);

cudaError_t conv3x3_forward(const Conv3x3Forward& args, DType dtype, cudaStream_t stream);
cudaError_t conv3x3_dgrad(const Conv3x3Dgrad& args, DType dtype, cudaStream_t stream);
cudaError_t conv3x3_wgrad(const Conv3x3Wgrad& args, DType dtype, cudaStream_t stream);

}  // namespace ran::cuda
