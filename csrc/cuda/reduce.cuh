// Reductions whose order is fixed by the shape alone, so that the same input gives the same bits on every run. Floats
// are never added atomically.
#pragma once

#include "../math.h"
#include "launch.cuh"

namespace ran {

// What batch normalisation's backward pass sums over a channel.
struct GradientSums {
  float dz, dz_xhat;
};
__device__ __forceinline__ GradientSums merge(GradientSums a, GradientSums b) {
  return {a.dz + b.dz, a.dz_xhat + b.dz_xhat};
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

__device__ __forceinline__ GradientSums shuffle_xor(GradientSums s, int lanes) {
  return {__shfl_xor_sync(~0u, s.dz, lanes), __shfl_xor_sync(~0u, s.dz_xhat, lanes)};
}
__device__ __forceinline__ Moments<float> shuffle_xor(Moments<float> m, int lanes) {
  return {__shfl_xor_sync(~0u, m.count, lanes), __shfl_xor_sync(~0u, m.mean, lanes), __shfl_xor_sync(~0u, m.m2, lanes)};
}

// The block is blockDim.x columns by blockDim.y (a power of two) rows of threads, each with V states. Merges the rows
// of every column in a fixed tree; the result is in row 0. `scratch`: V * blockDim.x * blockDim.y / 2 states, free to
// use again on return.
template <int V, typename State>
__device__ __forceinline__ void merge_rows(State (&state)[V], Shared<State> scratch) {
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    const int row = threadIdx.y % half;
    // Neighbouring threads touch neighbouring states.
    const auto slot = scratch + (row * V * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
    if (static_cast<int>(threadIdx.y) >= half && static_cast<int>(threadIdx.y) < 2 * half) {
#pragma unroll
      for (int i = 0; i < V; ++i) slot[i * blockDim.x] = state[i];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const State other = slot[i * blockDim.x];
        state[i] = merge(state[i], other);
      }
    }
    __syncthreads();
  }
}

// True in every thread of the block that comes last of `blocks`; it then sees what all the others wrote before. The
// counter is left at zero for the next launch. `flag`: one shared word.
__device__ __forceinline__ bool last_block(unsigned* counter, unsigned blocks, Shared<unsigned> flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) flag[0] = atomicInc(counter, blocks - 1);
  __syncthreads();
  const unsigned before = flag[0];
  __threadfence();
  return before == blocks - 1;
}

}  // namespace ran
