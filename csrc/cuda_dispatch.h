// Which of two ways a pass on a GPU takes: a 1x1 convolution the fused kernels, or the library's convolution after one
// fused BN-ReLU pass; BN-ReLU the kernel that holds a tensor in shared memory, or those that stream it.
#pragma once

#include <string>
#include <vector>

#include "conv_paths.h"
#include "cuda/conv1x1.h"

namespace ran {

// One measurement: where the fused kernel (of BN-ReLU: the resident one) took `fused_us` and the other way, the
// library's (streaming), `library_us`. It speaks for its own shape.
struct Measured {
  int arch;  // 90 for compute capability 9.0
  DType dtype;
  std::string pass;           // forward, dgrad, wgrad, gate; bn_relu, bn_relu_backward
  int64_t rows, c_in, c_out;  // output pixels (of a gate: the mask's), channels
  double fused_us, library_us;
};

// Replaces the table; ran_ext/dispatch.json is loaded into it at import. Throws std::invalid_argument for an unknown
// pass.
void set_measured(std::vector<Measured> table);

// The way of a pass that the fused kernel could take (cuda::conv1x1_supported): the faster of the measurement whose
// rows are nearest, among those of the same architecture, dtype, pass and channels; without one, the library's. The
// environment variable RAN_EXT_CONV1X1, read at every call, overrides it: `auto` (the table), `fused` or `library`.
ConvWay choose_conv1x1(ConvPass pass, const cuda::Conv1x1Shape& shape, DType dtype, int arch);

// The same of BN-ReLU's forward pass, or its backward, where x fits in shared memory: fused is the resident kernel,
// also where nothing was measured. RAN_EXT_BN_RELU overrides it: `auto`, `resident` or `streaming`.
ConvWay choose_bn_relu(bool backward, const ChannelView& view, DType dtype, int arch);

}  // namespace ran
