// The kernels of a tensor's device.
#pragma once

#include <c10/core/DeviceGuard.h>

#include "../cpu/kernels.h"
#include "tensors.h"
#ifdef RAN_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_launch.h"
#endif

namespace ran {

// Those of the instruction set that runs here for a dtype: the richest has them for bfloat16 alone.
const cpu::Kernels& cpu_kernels(at::ScalarType dtype);
inline const cpu::Kernels& cpu_kernels(const Tensor& x) { return cpu_kernels(x.scalar_type()); }

// Those that a convolution takes: of 256-bit vectors, where its channels leave too much of 512-bit ones empty.
const cpu::Kernels& conv_kernels(DType dtype, const cpu::ConvShape& shape);

// Runs a kernel that both devices have under one name, on x's device. A GPU's takes the current stream as well, and
// `op` names it where the launch fails.
#ifdef RAN_WITH_CUDA
#define RAN_RUN_KERNEL(op, x, kernel, ...)                           \
  do {                                                               \
    if ((x).is_cuda()) {                                             \
      const c10::DeviceGuard guard((x).device());                    \
      check_launch(cuda::kernel(__VA_ARGS__, current_stream()), op); \
    } else {                                                         \
      cpu_kernels(x).kernel(__VA_ARGS__);                            \
    }                                                                \
  } while (false)
#else
#define RAN_RUN_KERNEL(op, x, kernel, ...) cpu_kernels(x).kernel(__VA_ARGS__)
#endif

}  // namespace ran
