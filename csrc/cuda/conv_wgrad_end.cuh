// How the convolutions' weight gradients end: the sums that parts of the pixels have left, merged in a fixed order.
#pragma once

#include "conv1x1_partials.cuh"

namespace ran::cuda::conv1x1 {

// Four results a column of threads: the weight's, then the bias's.
template <typename T>
static __global__ void merge_splits_kernel(T* dweight, T* dbias, const float* partials, int splits, int64_t weights,
                                           int64_t all) {
  RAN_SHARED(Sum4, scratch, kMergeWidth * kMergeRows / 2);
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kMergeWidth + threadIdx.x, index = vector * 4;
  const Sum4 sum = merge_blocks(reinterpret_cast<const Sum4*>(partials), splits, all / 4, vector, scratch);
  if (threadIdx.y != 0 || index >= all) return;
  if (index < weights) {
    store<4>(dweight + index, sum.value);
  } else if (dbias) {
    store<4>(dbias + (index - weights), sum.value);
  }
}

// Merges `splits` parts of `all` sums: those of the `weights`, then those of dbias, which may be null.
template <typename T>
cudaError_t finish_wgrad(T* dweight, T* dbias, const float* partials, int splits, int64_t weights, int64_t all,
                         cudaStream_t stream) {
  return RAN_LAUNCH(merge_shape(all / 4), stream, merge_splits_kernel<T>, dweight, dbias, partials, splits, weights,
                    all);
}

}  // namespace ran::cuda::conv1x1
