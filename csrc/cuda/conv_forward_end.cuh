// How the forward convolutions end: bias, residual, rounding, and the next batch normalisation's statistics.
#pragma once

#include "batch_norm.cuh"
#include "conv1x1_partials.cuh"

namespace ran::cuda::conv1x1 {

// Stores a row's 8 sums with bias and residual added, rounded once; the values as they are stored.
template <typename T>
__device__ __forceinline__ Pack<T, 8> store_sums(T* y, const Pack<T, 8>& bias, const Pack<T, 8>& residual,
                                                 float (&sums)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = sums[i] + to_float(bias.value[i]) + to_float(residual.value[i]);
  const auto rounded = pack_floats<T>(sums);
  store_pack<8>(y, rounded);
  return rounded;
}

// Mean and sum of squared deviations of a thread's 8 columns, row by row (Welford 1962).
struct ColumnMoments {
  float count = 0, mean[8] = {}, m2[8] = {};

  __device__ __forceinline__ void add(const float (&v)[8]) {
    count += 1;
    const float share = 1 / count;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float delta = v[i] - mean[i];
      mean[i] = std::fma(delta, share, mean[i]);
      m2[i] = std::fma(delta, v[i] - mean[i], m2[i]);
    }
  }
  // As this block's partial result. All threads must come.
  template <typename Tile>
  __device__ __forceinline__ void leave(Moments<float>* partials, int first_column, int columns,
                                        Shared<float> scratch) const {
    Moments<float> state[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) state[i] = {count, mean[i], m2[i]};
    leave_partials<Tile>(state, partials, first_column, columns, scratch);
  }
};

// One channel a column of threads. The batch has been counted by the kernel before, so that all blocks see one number.
static __global__ void statistics_kernel(const ConvStatistics out, const Moments<float>* partials, int blocks,
                                         int channels) {
  RAN_SHARED(Moments<float>, scratch, kMergeWidth * kMergeRows / 2);
  const int channel = blockIdx.x * kMergeWidth + threadIdx.x;
  const Moments<float> all = merge_blocks(partials, blocks, channels, channel, scratch);
  if (threadIdx.y != 0 || channel >= channels) return;
  if (out.running.mean) {
    const float factor =
        out.running.momentum >= 0 ? out.running.momentum : 1 / static_cast<float>(*out.running.batches);
    update_running(out.running, factor, channel, all.mean, all.m2 / (all.count - 1));
  }
  out.mean[channel] = all.mean;
  out.var[channel] = all.count > 0 ? all.m2 / all.count : 0;
}

// Merges the moments that `blocks` blocks have left.
inline cudaError_t finish_statistics(const ConvStatistics& out, const Moments<float>* partials, int blocks,
                                     int channels, cudaStream_t stream) {
  return RAN_LAUNCH(merge_shape(channels), stream, statistics_kernel, out, partials, blocks, channels);
}

}  // namespace ran::cuda::conv1x1
