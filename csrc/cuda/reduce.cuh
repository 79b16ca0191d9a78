// Reductions whose order is fixed by the shape alone, so that the same input gives the same bits on every run. Floats
// are never added atomically.
#pragma once

#include "../common/formulas.h"
#include "launch.cuh"

namespace ran {

// What batch normalisation's backward pass sums over a channel.
struct alignas(8) GradientSums {
  float dz, dz_xhat;
};
__device__ __forceinline__ GradientSums merge(GradientSums a, GradientSums b) {
  return {a.dz + b.dz, a.dz_xhat + b.dz_xhat};
}

__device__ __forceinline__ float merge(float a, float b) { return a + b; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
__device__ __forceinline__ GradientSums shuffle_xor(GradientSums s, int lanes) {
  return {__shfl_xor_sync(~0u, s.dz, lanes), __shfl_xor_sync(~0u, s.dz_xhat, lanes)};
}
__device__ __forceinline__ Moments<float> shuffle_xor(Moments<float> m, int lanes) {
  return {shuffle_xor(m.count, lanes), shuffle_xor(m.mean, lanes), shuffle_xor(m.m2, lanes)};
}

// a[i] = merge(a[i], b[i]).
template <int V, typename State>
__device__ __forceinline__ void merge_all(State (&a)[V], const State (&b)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) a[i] = merge(a[i], b[i]);
}
// A thread has as many values of each of its columns, so that one division serves all.
template <int V>
__device__ __forceinline__ void merge_all(Moments<float> (&a)[V], const Moments<float> (&b)[V]) {
  const float count = a[0].count + b[0].count, share = count == 0.0f ? 0.0f : b[0].count / count;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float delta = b[i].mean - a[i].mean;
    a[i] = {count, std::fma(delta, share, a[i].mean), a[i].m2 + b[i].m2 + (a[i].count * delta) * (share * delta)};
  }
}

// The block's threads walk rows of `lanes` (a power of two <= 32) threads, each with V states of its own columns.
// Merges the states of every column; thread c < V * lanes returns that of column c. `scratch`: V * lanes states a warp,
// which no thread may be reading any more.
template <int V, typename State>
__device__ __forceinline__ State merge_columns(State (&state)[V], int lanes, Shared<State> scratch) {
  // A lane's states change places among themselves: lanes whose states begin on one bank then use different ones.
  const auto place = [](int lane, int i) {
    constexpr int kLanes =
        std::max(1, 128 / (V * static_cast<int>(sizeof(State))));  // whose states take all banks once
    return lane * V + (i ^ lane / kLanes % V);
  };
  const int columns = V * lanes, rank = thread_rank(), lane = rank % 32;
  for (int apart = 16; apart >= lanes; apart /= 2) {
    State other[V];
#pragma unroll
    for (int i = 0; i < V; ++i) other[i] = shuffle_xor(state[i], apart);
    merge_all(state, other);
  }
  if (lane < lanes)
#pragma unroll
    for (int i = 0; i < V; ++i) scratch[rank / 32 * columns + place(lane, i)] = state[i];
  __syncthreads();
  State total{};
  const int mine = place(rank / V, rank % V);
  if (rank < columns)
    for (int warp = 0; warp < static_cast<int>(blockDim.x * blockDim.y) / 32; ++warp) {
      const State other = scratch[warp * columns + mine];
      total = merge(total, other);
    }
  return total;
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
