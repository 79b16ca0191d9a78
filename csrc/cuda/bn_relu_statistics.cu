// Mean and variance of every channel in one launch, with what nn.BatchNorm2d keeps of them. Each thread takes the mean
// of a few values and then their squared deviations; pairs (mean, M2) are merged by Chan's formula. All is relative to
// the channel's first value: its digits would else be lost to a mean of many standard deviations when two means are
// subtracted.
#include "batch_norm.cuh"

namespace ran::cuda {
namespace {

struct StatisticsOutput {
  float *mean, *var;
  RunningStatistics running;
  float2* workspace;
  unsigned* counters;
};

template <int V>
__device__ __forceinline__ void finish_statistics(Moments<float> (&state)[V], const float (&pivot)[V],
                                                  const StatisticsOutput& out, int64_t channel, const ChannelView& view,
                                                  int64_t tile_size) {
  RAN_SHARED(Moments<float>, scratch, V * kReduceThreads / 2);
  RAN_SHARED(unsigned, flag, 1);
  const int64_t count = view.outer * view.inner;
  const auto read = [=](float2 partial, int tile) {
    return Moments<float>{static_cast<float>(min(tile_size, count - tile * tile_size)), partial.x, partial.y};
  };
  const auto finish = [&](int i, Moments<float> m) {
    const float n = static_cast<float>(count), mean = pivot[i] + m.mean;
    out.mean[channel + i] = mean;
    out.var[channel + i] = m.m2 / n;
    if (out.running.mean)
      update_running(out.running, running_factor(out.running), channel + i, mean, m.m2 / (n - 1.0f));
  };
  if (!reduce_tiles<V>(state, out.workspace, out.counters, channel, view.channels, scratch, flag, read, finish)) return;
  // Every channel group has read the number of batches before the last one counts this batch.
  if (out.running.batches && last_block(out.counters + gridDim.x, gridDim.x, flag) && threadIdx.x + threadIdx.y == 0)
    ++*out.running.batches;
}

// Moments of V channels that have as many values each, so that a merge divides once for all of them.
template <int V>
struct ChannelMoments {
  float count = 0, mean[V] = {}, m2[V] = {};

  // v[i][j] for j < there, of kCount.
  template <int kCount>
  __device__ __forceinline__ void add(const float (&v)[V][kCount], int there) {
    const float n = static_cast<float>(there), all = count + n, inverse = 1.0f / n, share = n / all;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum += j < there ? v[i][j] : 0.0f;
      const float own = sum * inverse, delta = own - mean[i];
#pragma unroll
      for (int j = 0; j < kCount; ++j) squares = j < there ? std::fma(v[i][j] - own, v[i][j] - own, squares) : squares;
      mean[i] = std::fma(delta, share, mean[i]);
      m2[i] += squares + (count * delta) * (share * delta);
    }
    count = all;
  }
};

// Moments of the values that are there: v[j] for j < count.
template <int kCount>
__device__ __forceinline__ Moments<float> moments_of(const float (&v)[kCount], int count) {
  float sum = 0.0f, m2 = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum += j < count ? v[j] : 0.0f;
  const float mean = sum / static_cast<float>(count);
#pragma unroll
  for (int j = 0; j < kCount; ++j) m2 = j < count ? std::fma(v[j] - mean, v[j] - mean, m2) : m2;
  return {static_cast<float>(count), mean, m2};
}

// channels_last: x is (rows, channels).
template <typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, 2)
    statistics_rows_kernel(StatisticsOutput out, const T* __restrict__ x, ChannelView view, int64_t tile_size) {
  const int64_t channel = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  const int64_t start = blockIdx.y * tile_size;
  const int rows = channel < view.channels ? static_cast<int>(min(tile_size, view.outer - start)) : 0;
  const T* tile = x + start * view.channels + channel;
  ChannelMoments<V> moments;
  float pivot[V] = {};
  if (channel < view.channels) load<V>(x + channel, pivot);
  for (int row = threadIdx.y; row < rows; row += kLoads * blockDim.y) {
    Pack<T, V> pack[kLoads];
    const int there = min(kLoads, (rows - row + static_cast<int>(blockDim.y) - 1) / static_cast<int>(blockDim.y));
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (j < there) pack[j] = load_pack<V>(tile + int64_t(row + j * blockDim.y) * view.channels);
    float v[V][kLoads];
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int j = 0; j < kLoads; ++j) v[i][j] = to_float(pack[j].value[i]) - pivot[i];
    moments.add(v, there);
  }
  Moments<float> state[V];
#pragma unroll
  for (int i = 0; i < V; ++i) state[i] = {moments.count, moments.mean[i], moments.m2[i]};
  finish_statistics<V>(state, pivot, out, channel, view, tile_size);
}

// NCHW: the block's channel is `outer` runs of `inner` values.
template <typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, 2)
    statistics_planes_kernel(StatisticsOutput out, const T* __restrict__ x, ChannelView view, int64_t tile_size) {
  const int64_t channel = blockIdx.x, start = blockIdx.y * tile_size;
  const int vectors = static_cast<int>(min(tile_size, view.outer * view.inner - start) / V);
  const ChannelWalk<V> walk(view, channel, start);
  float first[V];
  load<V>(x + channel * view.inner, first);
  const float pivot[1] = {first[0]};
  Moments<float> state[1] = {};
  for (int at = threadIdx.y; at < vectors; at += kLoads * kReduceThreads) {
    float v[kLoads * V];
    const int there = min(kLoads, (vectors - at + kReduceThreads - 1) / kReduceThreads);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      float loaded[V] = {};
      if (j < there) load<V>(x + walk.offset(at + j * kReduceThreads), loaded);
#pragma unroll
      for (int i = 0; i < V; ++i) v[j * V + i] = loaded[i] - pivot[0];
    }
    state[0] = merge(state[0], moments_of(v, there * V));
  }
  finish_statistics<1>(state, pivot, out, channel, view, tile_size);
}

}  // namespace

size_t bn_relu_workspace_bytes(ChannelView view) {
  return view.count() == 0 ? 0 : tiling(view).tiles * view.channels * sizeof(float2);
}

size_t bn_relu_counters(ChannelView view) { return view.channels + 1; }

cudaError_t bn_relu_statistics(float* mean, float* var, const void* x, DType dtype, ChannelView view,
                               RunningStatistics running, void* workspace, unsigned* counters, cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  const bool rows = view.inner == 1;
  const StatisticsOutput out{mean, var, running, static_cast<float2*>(workspace), counters};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors = aligned16(x) && (rows ? view.channels : view.inner) % kVector<T> == 0;
    return with_vector<T>(vectors, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (rows)
        return RAN_LAUNCH(reduce_shape(view, V), stream, statistics_rows_kernel<T, V>, out, static_cast<const T*>(x),
                          view, tiling(view).tile);
      return RAN_LAUNCH(reduce_shape(view, V), stream, statistics_planes_kernel<T, V>, out, static_cast<const T*>(x),
                        view, tiling(view).tile);
    });
  });
}

}  // namespace ran::cuda
