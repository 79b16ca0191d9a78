// How the convolutions' input gradients end: the ReLU's mask, and both sums of batch normalisation's backward pass.
#pragma once

#include "conv1x1_partials.cuh"

namespace ran::cuda::conv1x1 {

// Of 8 columns.
struct ColumnMask {
  float scale[8], shift[8], mean[8];

  // Stores a row's gradients where the ReLU let x pass, and adds what is stored to the columns' sums.
  template <typename T>
  __device__ __forceinline__ void store(T* to, const Pack<T, 8>& packed_x, float (&dz)[8],
                                        GradientSums (&total)[8]) const {
    float x[8];
    unpack(packed_x, x);
#pragma unroll
    for (int i = 0; i < 8; ++i)  // where z is NaN the gradient passes, as in torch
      dz[i] = relu_backward(dz[i], normalise(x[i], ScaleShift<float>{scale[i], shift[i]}));
    const auto rounded = pack_floats<T>(dz);
    store_pack<8>(to, rounded);
    unpack(rounded, dz);
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] = {total[i].dz + dz[i], std::fma(dz[i], x[i] - mean[i], total[i].dz_xhat)};
  }
};

// Of a tile's columns, side by side in shared memory.
struct ColumnTable {
  Shared<float> scale, shift, mean;

  template <int kColumns>
  static __device__ __forceinline__ ColumnTable fill(Shared<float> at, const BatchNorm<float>& norm, int first,
                                                     int channels) {
    const ColumnTable table{at, at + kColumns, at + 2 * kColumns};
    for (int i = thread_rank(); i < kColumns; i += kThreads) {
      const ScaleShift<float> s = channel_scale_shift(norm, first + i, channels);
      const int at = swapped_at(i);
      table.scale[at] = s.scale;
      table.shift[at] = s.shift;
      table.mean[at] = first + i < channels ? norm.mean[first + i] : 0;
    }
    return table;
  }
  // Of this thread's 8 columns.
  __device__ __forceinline__ ColumnMask mask() const {
    ColumnMask mine;
    load_swapped(scale, threadIdx.x, mine.scale);
    load_swapped(shift, threadIdx.x, mine.shift);
    load_swapped(mean, threadIdx.x, mine.mean);
    return mine;
  }
};

// One channel a column of threads; the partial dz_xhat still lack their common factor 1 / standard deviation.
static __global__ void gradient_sums_kernel(float* sum_dz, float* sum_dz_xhat, const GradientSums* partials,
                                            const BatchNorm<float> norm, int blocks, int channels) {
  RAN_SHARED(GradientSums, scratch, kMergeWidth * kMergeRows / 2);
  const int channel = blockIdx.x * kMergeWidth + threadIdx.x;
  const GradientSums all = merge_blocks(partials, blocks, channels, channel, scratch);
  if (threadIdx.y != 0 || channel >= channels) return;
  sum_dz[channel] = all.dz;
  sum_dz_xhat[channel] = all.dz_xhat / std::sqrt(norm.var[channel] + static_cast<float>(norm.eps));
}

// Merges the sums that `blocks` blocks have left.
inline cudaError_t finish_gradient_sums(float* sum_dz, float* sum_dz_xhat, const GradientSums* partials,
                                        const BatchNorm<float>& norm, int blocks, int channels, cudaStream_t stream) {
  return RAN_LAUNCH(merge_shape(channels), stream, gradient_sums_kernel, sum_dz, sum_dz_xhat, partials, norm, blocks,
                    channels);
}

}  // namespace ran::cuda::conv1x1
