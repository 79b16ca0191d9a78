// The CPU kernels, compiled once for each instruction set; common/cpu_kernels.cpp picks a set at run time.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace ran::cpu {

// A convolution of channels_last tensors: x (n, h, w, ci), weight (co, kh, kw, ci), out (n, ho, wo, co).
struct ConvShape {
  int64_t n, h, w, ci, ho, wo, co, kh, kw, stride_h, stride_w, pad_h, pad_w;

  int64_t pixels() const { return n * ho * wo; }  // of the output
  int64_t taps() const { return kh * kw; }
  // Each output pixel reads the one input pixel of its own place.
  bool is_pointwise() const { return taps() == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0; }
};

// What a 3x3 convolution (stride 1, padding 1) runs on: the library, or Winograd F(m x m, 3x3),
// whose value is m.
enum class Conv3x3 : int { library = 0, f2x2 = 2, f4x4 = 4 };

// The kernels of one instruction set.
struct Kernels {
  const char* name;
#define RAN_KERNEL(result, name, arguments) result(*name) arguments;
#include "kernel_list.h"
};

}  // namespace ran::cpu

#ifdef RAN_ISA
namespace ran::cpu::RAN_ISA {
#define RAN_KERNEL(result, name, arguments) result name arguments;
#include "kernel_list.h"
}  // namespace ran::cpu::RAN_ISA
#endif
