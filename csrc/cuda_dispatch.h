// Which of two ways a 1x1 convolution on a GPU takes: the fused kernels, or the library's convolution after one fused
// BN-ReLU pass.
#pragma once

#include <vector>

#include "conv_paths.h"
#include "cuda/conv1x1.h"

namespace ran {

// One measurement: where the fused kernel took `fused_us` and the library `library_us`. It speaks for its own shape.
struct Measured {
  int arch;  // 90 for compute capability 9.0
  DType dtype;
  ConvPass pass;
  int64_t rows, c_in, c_out;  // output pixels (of a gate: the mask's), channels
  double fused_us, library_us;
};

// Replaces the table; ran_ext/dispatch.json is loaded into it at import.
void set_measured(std::vector<Measured> table);

// The way of a pass that the fused kernel could take (cuda::conv1x1_supported): the faster of the measurement whose
// rows are nearest, among those of the same architecture, dtype, pass and channels; without one, the library's. The
// environment variable RAN_EXT_CONV1X1, read at every call, overrides it: `auto` (the table), `fused` or `library`.
ConvWay choose_conv1x1(ConvPass pass, const cuda::Conv1x1Shape& shape, DType dtype, int arch);

}  // namespace ran
