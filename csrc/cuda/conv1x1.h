// 1x1 convolutions of channels_last tensors as matrix products, with the batch normalisation, ReLU, residual, attention
// gate and statistics around them fused in. bf16 or fp16 tensors, fp32 accumulation and vectors. No torch here.
#pragma once

#include <string>

#include "conv_args.h"

namespace ran::cuda {

// x is (n, h, w, c_in), the weight (c_out, c_in), y (n, out_h, out_w, c_out), all dense. Padding is 0, so a row of the
// matrix product is an output pixel, and reads the one input pixel at `stride` times its place.
struct Conv1x1Shape {
  int64_t n, h, w, c_in, c_out;
  int stride;
  bool pieces = false;  // whether x is in pieces: of stride 1, normalised, and as reads_pieces() takes them
  int64_t out_h() const { return (h + stride - 1) / stride; }
  int64_t out_w() const { return (w + stride - 1) / stride; }
  int64_t rows() const { return n * out_h() * out_w(); }
};

// out = (1 + sigmoid(y)) * trunk, where y is up-sampled (nearest) by `scale` and cropped to the trunk's h and w.
struct Conv1x1Gate {
  void* out;  // null: no gate
  const void* trunk;
  int64_t h, w;
  int scale;  // 1 or 2
};

// With a gate y is the mask's logits, which its backward pass needs. Without norm.mean x is taken as it is, also
// without the ReLU.
struct Conv1x1Forward : ConvForward<Conv1x1Shape> {
  Conv1x1Gate gate{};
};
using Conv1x1Dgrad = ConvDgrad<Conv1x1Shape>;  // stride 1 only
using Conv1x1Wgrad = ConvWgrad<Conv1x1Shape>;

// Whether the kernels below take this shape on the current device; where they do not, `why` (if given) says so in
// words.
bool conv1x1_supported(ConvPass pass, const Conv1x1Shape& shape, DType dtype, std::string* why);

// Bytes of scratch a pass needs on the current device; 16-byte aligned, contents irrelevant before and after. And the
// words that it counts in, zero before and after.
size_t conv1x1_workspace(ConvPass pass, const Conv1x1Shape& shape);
size_t conv1x1_counters(ConvPass pass, const Conv1x1Shape& shape);

// Each returns what cudaGetLastError() does after its launches, and cudaErrorInvalidValue for a shape not supported or
// a tensor off a 16-byte boundary. Nothing allocates or synchronises, the order of every sum is fixed on a given
// device, and all may be captured into a graph.
cudaError_t conv1x1_forward(const Conv1x1Forward& args, DType dtype, cudaStream_t stream);
cudaError_t conv1x1_dgrad(const Conv1x1Dgrad& args, DType dtype, cudaStream_t stream);
cudaError_t conv1x1_wgrad(const Conv1x1Wgrad& args, DType dtype, cudaStream_t stream);

}  // namespace ran::cuda
