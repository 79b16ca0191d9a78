// The choice of what a pass of a convolution runs on.
#pragma once

#include <string>

#include "../common/measured.h"
#include "convolution.h"

namespace ran {

// A kernel of ours, or the library's convolution with one fused pass of BN-ReLU, and the reason.
enum class ConvPath {
  winograd_f4x4,
  winograd_f2x2,
  product,  // a 1x1 convolution, or a weight gradient, as a matrix product; on a GPU a 3x3 one, too
  last_of_ours = product,
  library_empty,    // x is
  library_layout,   // x is not channels_last
  library_asked,    // by set_conv3x3
  library_better,   // at a 3x3 convolution of this size: faster by rule, or more accurate than the mode allows
  library_minimum,  // the CPU's kernels need AVX2, 16 channels, no float64
  library_shape,    // no kernel for this kernel size, stride or padding
  library_decided,  // by what was measured; on a GPU also by set_conv1x1, and where nothing was measured
  library_refused,  // the GPU's kernel does not take this shape
  library_apart,    // a convolution and the gate behind it: no kernel for both
};
inline bool is_fused(ConvPath path) { return path <= ConvPath::last_of_ours; }

// A path, and from where the choice comes.
struct ConvChoice {
  ConvPath path;
  Source source = Source::only;
  operator ConvPath() const { return path; }
};

ConvChoice choose_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);
// Of a 1x1 convolution and the gate that takes its output: is_fused where one kernel does both.
ConvChoice choose_conv_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale,
                            const Asked& asked);
// Of a convolution with no normalisation before it: Winograd's kernels or the library.
ConvChoice choose_plain_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);
// What a choice by measurement is made for, of a pass or its twin in conv2d.
PassShape pass_shape(Pass pass, const Tensor& x, const Tensor& weight, const Convolution& conv);

// Which tile a 3x3 convolution of the CPU's takes by rule, or `library`.
cpu::Conv3x3 choose_conv3x3(ConvPass pass, DType dtype, const cpu::ConvShape& shape, Conv3x3Mode mode);
// Of a Winograd path.
inline cpu::Conv3x3 tile_of(ConvPath path) {
  return path == ConvPath::winograd_f4x4 ? cpu::Conv3x3::f4x4 : cpu::Conv3x3::f2x2;
}

// The choice in words, for ran_ext.explain.
std::string describe(const ConvChoice& choice, ConvPass pass, const Tensor& x, const Tensor& weight,
                     const Convolution& conv);

}  // namespace ran
