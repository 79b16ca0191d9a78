// How much dynamic shared memory a kernel may have.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace ran {

// Lets `kernel` have `bytes` on the current device. Beyond 48 KiB that must be asked for, and what is asked for last
// holds for the launches of all host threads: so it is never lowered again, or one thread would take from another what
// it has just asked for.
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  static std::mutex mutex;
  static auto& allowed = *new std::map<std::pair<const void*, int>, size_t>;  // never destroyed: launches may come late
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace ran
