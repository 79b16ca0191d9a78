// Times measured on a GPU, by which a pass takes one of two paths: a 1x1 convolution the fused kernels, or the
// library's convolution after one fused BN-ReLU pass; BN-ReLU the kernel that holds a tensor in shared memory, or those
// that stream it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "types.h"

namespace ran {

// One measurement: where the fused kernel (of BN-ReLU: the resident one) took `fused_us` and the other path, the
// library's (streaming), `library_us`. It speaks for its own shape.
struct Measured {
  int arch;  // 90 for compute capability 9.0
  DType dtype;
  std::string pass;           // forward, dgrad, wgrad, gate; bn_relu, bn_relu_backward
  int64_t rows, c_in, c_out;  // output pixels (of a gate: the mask's), channels
  double fused_us = 0, library_us = 0;
};

// Replaces the table; ran_ext/dispatch.json is loaded into it at import. Throws std::invalid_argument for an unknown
// pass.
void set_measured(std::vector<Measured> table);

// Two paths of a pass, by name, and the environment variable that asks for one of them: the fused one's name, the
// other's, or "auto". It is read at every call.
struct TwoPaths {
  const char* variable;
  const char* fused;
  const char* other;
};

// Which of the two a pass takes: the one asked for, else the faster of the measurement whose rows are nearest to those
// of `pass`, whose times do not matter, among those of the same architecture, dtype, pass and channels.
enum class Decision { unmeasured, fused_asked, other_asked, fused_faster, other_faster };
Decision decide(const Measured& pass, const TwoPaths& paths);

// The decision in words, such as "measured at 4096 pixels: fused 5.0 us, library 6.0 us"; "" where nothing was
// measured.
std::string describe(const Measured& pass, const TwoPaths& paths);

}  // namespace ran
