// What blocks leave for each other in the workspace, and its merge in a fixed order by a second kernel.
#pragma once

#include "conv1x1_tile.cuh"
#include "reduce.cuh"

namespace ran::cuda::conv1x1 {

// The second kernel's blocks: 32 results wide, the partial ones dealt to 8 rows of threads.
inline constexpr int kMergeWidth = 32, kMergeRows = 8;

inline LaunchShape merge_shape(int64_t results) {
  return {dim3(static_cast<unsigned>(blocks_for(results, kMergeWidth))), dim3(kMergeWidth, kMergeRows)};
}

// The block is blockDim.x columns by blockDim.y (a power of two) rows of threads, each with V states. Merges the rows
// of every column in a fixed tree; the result is in row 0. `scratch`: V * blockDim.x * blockDim.y / 2 states, free to
// use again on return.
template <int V, typename State>
__device__ __forceinline__ void merge_rows(State (&state)[V], Shared<State> scratch) {
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    // Neighbouring threads, also those of two rows, touch neighbouring states.
    const int row = threadIdx.y % half, apart = half * static_cast<int>(blockDim.x);
    const auto slot = scratch + (row * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
    if (static_cast<int>(threadIdx.y) >= half && static_cast<int>(threadIdx.y) < 2 * half) {
#pragma unroll
      for (int i = 0; i < V; ++i) slot[i * apart] = state[i];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const State other = slot[i * apart];
        state[i] = merge(state[i], other);
      }
    }
    __syncthreads();
  }
}

// Four sums side by side.
struct alignas(16) Sum4 {
  float value[4];
};
__device__ __forceinline__ Sum4 merge(const Sum4& a, const Sum4& b) {
  return {{a.value[0] + b.value[0], a.value[1] + b.value[1], a.value[2] + b.value[2], a.value[3] + b.value[3]}};
}

// The merge over blocks of partials[block][index] of `width`; row 0 of the threads has it. All threads must come.
template <typename State>
__device__ __forceinline__ State merge_blocks(const State* partials, int blocks, int64_t width, int64_t index,
                                              Shared<State> scratch) {
  State state[1] = {};
  if (index < width)
    for (int block = threadIdx.y; block < blocks; block += kMergeRows)
      state[0] = merge(state[0], partials[block * width + index]);
  merge_rows<1>(state, scratch);
  return state[0];
}

// Where the depth is split: leaves this block's sums of its tile in the workspace, and in the block that comes last
// adds up those of all splits, in their order. Whether this is that block, which alone goes on. `flag`: one shared
// word.
template <typename Tile, typename Sums>
__device__ __forceinline__ bool merge_splits(Sums& sums, float* workspace, unsigned* counters, Shared<unsigned> flag) {
  if constexpr (Tile::kSplits) {
    if (gridDim.z == 1) return true;
    constexpr int kFloats = Tile::kBlocks * Tile::kColumns / 2;  // a thread's, kept as [vector of 4][thread]
    float* mine = &sums[0][0][0];
    const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x;
    float* first = workspace + static_cast<int64_t>(tile) * gridDim.z * kFloats * kThreads + 4 * thread_rank();
    float* to = first + static_cast<int64_t>(blockIdx.z) * kFloats * kThreads;
#pragma unroll
    for (int i = 0; i < kFloats; i += 4)
      store_pack<4>(to + i * kThreads, Pack<float, 4>{mine[i], mine[i + 1], mine[i + 2], mine[i + 3]});
    if (!last_block(counters + tile, gridDim.z, flag)) return false;
#pragma unroll
    for (int i = 0; i < kFloats; ++i) mine[i] = 0;
#pragma unroll 1
    for (unsigned split = 0; split < gridDim.z; ++split) {
      const float* from = first + static_cast<int64_t>(split) * kFloats * kThreads;
#pragma unroll
      for (int i = 0; i < kFloats; i += 4) {
        float v[4];
        load<4>(from + i * kThreads, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) mine[i + j] += v[j];
      }
    }
  }
  return true;
}

// Merges what the threads of a block have on their 8 columns, and leaves it in the workspace. `scratch` may have been
// in use up to here.
template <typename Tile, typename State>
__device__ __forceinline__ void leave_partials(State (&state)[8], State* partials, int first_column, int columns,
                                               Shared<float> scratch) {
  static_assert(sizeof(State) * 8 * kThreads / 2 <= sizeof(float) * kWarps * Tile::kStageFloats);
  __syncthreads();
  merge_rows<8>(state, shared_cast<State>(scratch));
  const int column = first_column + 8 * threadIdx.x;
  if (threadIdx.y != 0 || column >= columns) return;
  constexpr int kFloats = 8 * sizeof(State) / sizeof(float);
  float values[kFloats];
  memcpy(values, state, sizeof values);
  const auto to = reinterpret_cast<float*>(partials + (static_cast<int64_t>(blockIdx.x) * columns + column));
#pragma unroll
  for (int i = 0; i < kFloats; i += 4)
    store_pack<4>(to + i, Pack<float, 4>{values[i], values[i + 1], values[i + 2], values[i + 3]});
}

}  // namespace ran::cuda::conv1x1
