// Launching kernels, shared memory, and the barriers wider than a block. Under RAN_EMULATE the same names run on the
// CPU (tests/emulation).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(RAN_EMULATE)
#include "cuda_emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "shared_limit.h"
#endif

#include "../common/types.h"

namespace ran {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic
  unsigned cluster = 1;      // blocks along x that share their memories
  bool cooperative = false;  // the whole grid is resident, grid_sync() may be used
};

// Number of blocks of `per_block` needed for `count`.
inline int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

constexpr int kCellThreads = 256;

// A grid over `rows` x `columns` of work in blocks of kCellThreads, as wide as the columns allow; for_each_cell walks
// it.
inline LaunchShape cells_shape(int64_t rows, int64_t columns) {
  unsigned width = 1;
  while (width < kCellThreads && width < columns) width *= 2;
  const unsigned height = kCellThreads / width;
  LaunchShape shape;
  shape.block = dim3(width, height);
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks_for(rows, height), 0x7fffffff)),
                    static_cast<unsigned>(std::min<int64_t>(blocks_for(columns, width), 0xffff)));
  return shape;
}

template <typename Body>
__device__ __forceinline__ void for_each_cell(int64_t rows, int columns, Body&& body) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.x) * blockDim.y)
    for (int column = blockIdx.y * blockDim.x + threadIdx.x; column < columns; column += gridDim.y * blockDim.x)
      body(row, column);
}

struct Quotient {
  int64_t quotient;
  int remainder;
};

// a / b for a >= 0 and b > 0, in 32 bits where a has no more.
__device__ __forceinline__ Quotient divide(int64_t a, int b) {
  if (a >> 32 == 0) {
    const unsigned quotient = static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return {quotient, static_cast<int>(static_cast<unsigned>(a) - quotient * static_cast<unsigned>(b))};
  }
  const int64_t quotient = a / b;
  return {quotient, static_cast<int>(a - quotient * b)};
}

// Of a thread in its block.
__device__ __forceinline__ int thread_rank() { return threadIdx.y * blockDim.x + threadIdx.x; }

#if defined(RAN_EMULATE)

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const char* name, const LaunchShape& shape, cudaStream_t, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  emu::Launched& launched = emu::launches[reinterpret_cast<const void*>(kernel)];
  if (launched.name.empty()) launched.name = emu::kernel_name(name, __PRETTY_FUNCTION__);
  const std::tuple<Parameters...> held(static_cast<Parameters>(arguments)...);
  std::apply(
      [&](const auto&... parameters) {
        const emu::Kernel ours{reinterpret_cast<const void*>(kernel),
                               [&] { kernel(parameters...); },
                               {reinterpret_cast<const unsigned char*>(&parameters)...}};
        emu::run(launched, {shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.cooperative}, ours);
      },
      held);
  return cudaGetLastError();
}
#define RAN_LAUNCH(shape, stream, ...) ::ran::launch(#__VA_ARGS__, shape, stream, __VA_ARGS__)

inline void cluster_sync(int line = __builtin_LINE()) { emu::gang_sync("cluster_sync", line); }
inline void grid_sync(int line = __builtin_LINE()) { emu::gang_sync("grid_sync", line); }
inline unsigned cluster_rank() { return emu::self->block->rank; }
template <typename T>
Shared<T> cluster_shared(Shared<T> p, unsigned rank) {
  return {emu::twin(*p.region, emu::block_of_rank(rank)), p.offset};
}

#else

template <typename T>
using Shared = T*;

template <typename To, typename From>
__device__ __forceinline__ To* shared_cast(From* p) {
  return reinterpret_cast<To*>(p);
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

#define RAN_SHARED(T, name, count) __shared__ __align__(16) T name[count]

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  if (const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shape.shared_bytes))
    return error;
  if (shape.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = attributes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? cudaGetLastError() : error;
}
// The kernel and its arguments follow; a macro, so that the emulation knows the kernel's name.
#define RAN_LAUNCH(shape, stream, ...) ::ran::launch(shape, stream, __VA_ARGS__)

__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Clusters exist from sm_90 on; code for older ones is compiled and never launched with a cluster.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// The same place in the shared memory of the cluster's block `rank`.
template <typename T>
__device__ __forceinline__ T* cluster_shared(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  T* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(p), "r"(rank));
  return remote;
#else
  return p;
#endif
}

#endif

}  // namespace ran
