// The sum of every channel in one launch: the gradient of a convolution's bias.
#include "batch_norm.cuh"

namespace ran::cuda {
namespace {

// channels_last: x is (rows, channels).
template <typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, 2)
    channel_sums_kernel(T* sums, const T* __restrict__ x, ChannelView view, int64_t tile_size, float2* workspace,
                        unsigned* counters) {
  RAN_SHARED(float, scratch, kReduceThreads);
  RAN_SHARED(unsigned, flag, 1);
  const int64_t group = int64_t(blockIdx.x) * blockDim.x * V, channel = group + threadIdx.x * V;
  const int64_t start = blockIdx.y * tile_size;
  const int rows = channel < view.channels ? static_cast<int>(min(tile_size, view.outer - start)) : 0;
  const T* tile = x + start * view.channels + channel;
  float state[V] = {};
  for (int row = threadIdx.y; row < rows; row += kLoads * blockDim.y) {
    Pack<T, V> pack[kLoads] = {};
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (row + j * static_cast<int>(blockDim.y) < rows)
        pack[j] = load_pack<V>(tile + int64_t(row + j * blockDim.y) * view.channels);
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i) state[i] += to_float(pack[j].value[i]);
  }
  const auto read = [](float2 partial, int) { return partial.x; };
  const auto finish = [&](int64_t channel, float sum) { sums[channel] = from_float<T>(sum); };
  reduce_tiles<V>(state, workspace, counters, group, view.channels, scratch, flag, read, finish);
}

}  // namespace

cudaError_t channel_sums(void* sums, const void* x, DType dtype, ChannelView view, void* workspace, unsigned* counters,
                         cudaStream_t stream) {
  if (view.inner != 1) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_vector<T>(aligned16(x, sums) && view.channels % kVector<T> == 0, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      return RAN_LAUNCH(reduce_shape(view, V), stream, channel_sums_kernel<T, V>, static_cast<T*>(sums),
                        static_cast<const T*>(x), view, tiling(view).tile, static_cast<float2*>(workspace), counters);
    });
  });
}

}  // namespace ran::cuda
