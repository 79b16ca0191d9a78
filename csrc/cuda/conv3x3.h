// 3x3 convolutions of channels_last tensors as matrix products, with the batch normalisation, ReLU, residual and
// statistics around them fused in. bf16 or fp16 tensors, fp32 accumulation and vectors. No torch here.
#pragma once

#include "conv1x1.h"

namespace ran::cuda {

// x is (n, h, w, c_in), the weight (c_out, 3, 3, c_in), y (n, out_h, out_w, c_out), all dense.
struct Conv3x3Shape {
  int64_t n, h, w, c_in, c_out;
  int stride, padding;
  int64_t out_h() const { return (h + 2 * padding - 3) / stride + 1; }
  int64_t out_w() const { return (w + 2 * padding - 3) / stride + 1; }
  int64_t rows() const { return n * out_h() * out_w(); }
};

// Whether the kernels below take this shape on the current device; where they do not, `why` (if given) says so in
// words. `pass`: forward, dgrad or wgrad.
bool conv3x3_supported(ConvPass pass, const Conv3x3Shape& shape, DType dtype, std::string* why);

// Bytes of scratch a pass needs on the current device; 16-byte aligned, contents irrelevant before and after. It holds
// sums a channel or a weight, and no pixel.
size_t conv3x3_workspace(ConvPass pass, const Conv3x3Shape& shape);

// y = conv(relu(bn(x))) + bias + residual, added in fp32 and rounded once. What lies outside x is 0 behind the ReLU.
struct Conv3x3Forward {
  void* y;
  ConvStatistics statistics;
  const void* x;
  BatchNorm<float> norm;
  const void* weight;
  const void* bias;      // (c_out) of x's dtype, or null
  const void* residual;  // of y's shape, or null
  Conv3x3Shape shape;
  void* workspace;
};

// dz = the gradient of relu(bn(x)) where bn(x) > 0, else 0; and the two sums over pixels, as Conv1x1Dgrad has them.
struct Conv3x3Dgrad {
  void* dz;            // of x's shape
  float* sum_dz;       // (c_in)
  float* sum_dz_xhat;  // (c_in)
  const void* dy;
  const void* x;
  BatchNorm<float> norm;
  const void* weight;
  Conv3x3Shape shape;
  void* workspace;
};

// The weight's gradient, with relu(bn(x)) computed again from x; dbias = sum of dy over pixels.
struct Conv3x3Wgrad {
  void* dweight;  // (c_out, 3, 3, c_in)
  void* dbias;    // (c_out) or null
  const void* dy;
  const void* x;
  BatchNorm<float> norm;
  Conv3x3Shape shape;
  void* workspace;
};

// As the 1x1 convolutions' launchers: no allocation, no synchronisation, sums in a fixed order.
cudaError_t conv3x3_forward(const Conv3x3Forward& args, DType dtype, cudaStream_t stream);
cudaError_t conv3x3_dgrad(const Conv3x3Dgrad& args, DType dtype, cudaStream_t stream);
cudaError_t conv3x3_wgrad(const Conv3x3Wgrad& args, DType dtype, cudaStream_t stream);

}  // namespace ran::cuda
