// The GPU that the torch side sees in this build: the emulation, and all of CUDA's runtime and of c10's half for CUDA
// that csrc asks for. Included before every file; torch's own headers come first, as the words below change after them.
#pragma once

#include <ATen/Version.h>
#include <c10/core/impl/alloc_cpu.h>

#include "csrc/common/torch_headers.h"

// Every tensor is one of the GPU, in memory that both see.
#define is_cuda defined
#define is_cpu is_meta
#define kCUDA kCPU

#include "cuda_emulation.h"

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
// An H200's.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrComputeCapabilityMajor ? 9 : name == cudaDevAttrMultiProcessorCount ? 132 : 227 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused"; }

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
struct CUDAStream {
  cudaStream_t stream() const { return nullptr; }
};
enum class CaptureStatus { None };
inline int current_device() { return -1; }
inline CUDAStream getCurrentCUDAStream() { return {}; }
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }

}  // namespace c10::cuda
