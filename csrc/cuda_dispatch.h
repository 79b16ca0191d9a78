// Which of two ways a convolution on a GPU takes: the fused kernels, or the library's convolution after one fused
// BN-ReLU pass. No torch here.
#pragma once

#include "cuda/conv1x1.h"

namespace ran {

// Whether a 1x1 convolution's pass takes the fused kernel on a device of compute capability `arch` (90 for 9.0). The
// kernel takes the shape (cuda::conv1x1_supported).
//
// By a table of measurements; where it says nothing, the library. The environment variable RAN_EXT_CONV1X1, read at
// every call, overrides it: `auto` (the table), `fused` (wherever the kernels take the shape) or `library`. Throws
// std::invalid_argument for another value.
bool use_fused_conv1x1(cuda::Conv1x1Pass pass, const cuda::Conv1x1Shape& shape, DType dtype, int arch);

}  // namespace ran
