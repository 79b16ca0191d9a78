// 1x1 convolutions of channels_last tensors as matrix products, with the batch normalisation, ReLU, residual, attention
// gate and statistics around them fused in. bf16 or fp16 tensors, fp32 accumulation and vectors. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace ran::cuda {

// x is (n, h, w, c_in), the weight (c_out, c_in), y (n, out_h, out_w, c_out), all dense. Padding is 0, so a row of the
// matrix product is an output pixel, and reads the one input pixel at `stride` times its place.
struct Conv1x1Shape {
  int64_t n, h, w, c_in, c_out;
  int stride;
  int64_t out_h() const { return (h + stride - 1) / stride; }
  int64_t out_w() const { return (w + stride - 1) / stride; }
  int64_t rows() const { return n * out_h() * out_w(); }
};

enum class Conv1x1Pass { forward, dgrad, wgrad };

// Whether the kernels below take this shape on the current device; where they do not, `why` (if given) says so in
// words.
bool conv1x1_supported(Conv1x1Pass pass, const Conv1x1Shape& shape, DType dtype, std::string* why);

// Bytes of scratch a pass needs on the current device; 16-byte aligned, contents irrelevant before and after. And the
// words that it counts in, zero before and after.
size_t conv1x1_workspace(Conv1x1Pass pass, const Conv1x1Shape& shape);
size_t conv1x1_counters(Conv1x1Pass pass, const Conv1x1Shape& shape);

// out = (1 + sigmoid(y)) * trunk, where y is up-sampled (nearest) by `scale` and cropped to the trunk's h and w.
struct Conv1x1Gate {
  void* out;  // null: no gate
  const void* trunk;
  int64_t h, w;
  int scale;  // 1 or 2
};

// Mean and biased variance of the stored output (of the gate's where there is one), for the next batch normalisation.
struct ConvStatistics {
  float* mean = nullptr;  // null: no statistics
  float* var = nullptr;
  RunningStatistics running;
};

// y = conv(relu(bn(x))) + bias + residual, added in fp32 and rounded once.
struct Conv1x1Forward {
  void* y;  // where there is a gate, the mask's logits, which its backward pass needs
  Conv1x1Gate gate;
  ConvStatistics statistics;
  const void* x;
  BatchNorm<float> norm;  // mean null: x as it is, without ReLU
  const void* weight;
  const void* bias;      // (c_out) of x's dtype, or null
  const void* residual;  // of y's shape, or null
  Conv1x1Shape shape;
  void* workspace;
  unsigned* counters;
};

// dz = (dy * weight) where z = bn(x) > 0, else 0; and the two sums over pixels that batch normalisation's backward
// takes (sum_dz is also the gradient of its bias, sum_dz_xhat that of its weight). Sums are over dz as stored. Stride 1
// only.
struct Conv1x1Dgrad {
  void* dz;            // of x's shape
  float* sum_dz;       // (c_in)
  float* sum_dz_xhat;  // (c_in)
  const void* dy;
  const void* x;
  BatchNorm<float> norm;
  const void* weight;
  Conv1x1Shape shape;
  void* workspace;
  unsigned* counters;
};

// dweight = dy^T * relu(bn(x)), with relu(bn(x)) computed again from x; dbias = sum of dy over pixels.
struct Conv1x1Wgrad {
  void* dweight;  // (c_out, c_in)
  void* dbias;    // (c_out) or null
  const void* dy;
  const void* x;
  BatchNorm<float> norm;
  Conv1x1Shape shape;
  void* workspace;
};

// Each returns what cudaGetLastError() does after its launches, and cudaErrorInvalidValue for a shape not supported or
// a tensor off a 16-byte boundary. Nothing allocates or synchronises, the order of every sum is fixed on a given
// device, and all may be captured into a graph.
cudaError_t conv1x1_forward(const Conv1x1Forward& args, DType dtype, cudaStream_t stream);
cudaError_t conv1x1_dgrad(const Conv1x1Dgrad& args, DType dtype, cudaStream_t stream);
cudaError_t conv1x1_wgrad(const Conv1x1Wgrad& args, DType dtype, cudaStream_t stream);

}  // namespace ran::cuda
