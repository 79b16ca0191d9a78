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

// `pivots`: of the block's columns, from which `state` is counted; set before by threads of the block.
template <int V>
__device__ __forceinline__ void finish_statistics(Moments<float> (&state)[V], Shared<float> pivots,
                                                  const StatisticsOutput& out, int64_t first, const ChannelView& view,
                                                  int64_t tile_size) {
  RAN_SHARED(Moments<float>, scratch, kReduceThreads);
  RAN_SHARED(unsigned, flag, 1);
  const int64_t count = view.outer * view.inner;
  const auto read = [=](float2 partial, int tile) {
    return Moments<float>{static_cast<float>(min(tile_size, count - tile * tile_size)), partial.x, partial.y};
  };
  const auto finish = [&](int64_t channel, const Moments<float>& m) {
    const float n = static_cast<float>(count), mean = pivots[static_cast<int>(channel - first)] + m.mean;
    if (out.running.mean) update_running(out.running, running_factor(out.running), channel, mean, m.m2 / (n - 1.0f));
    out.mean[channel] = mean;
    out.var[channel] = m.m2 / n;
  };
  if (!reduce_tiles<V>(state, out.workspace, out.counters, first, view.channels, scratch, flag, read, finish)) return;
  // Every channel group has read the number of batches before the last one counts this batch.
  if (out.running.batches && last_block(out.counters + gridDim.x, gridDim.x, flag) && thread_rank() == 0)
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

// What is added to x, one value a channel and a tensor, either of which may be null; the sum is written to `out`. It is
// rounded once, and the statistics are those of the rounded values.
template <typename T>
struct Addition {
  T* out;
  const T *bias, *residual;
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> added(const Pack<T, V>& x, const float (&bias)[V], const Pack<T, V>& residual) {
  float v[V], more[V];
  unpack(x, v);
  unpack(residual, more);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = (v[i] + bias[i]) + more[i];
  return pack_floats<T>(v);
}

// channels_last: x is (rows, channels). kAdds: of x with `addition`, else of x.
template <typename T, int V, bool kAdds>
__global__ void __launch_bounds__(kReduceThreads, 2)
    statistics_rows_kernel(StatisticsOutput out, const T* __restrict__ x, Addition<T> addition, ChannelView view,
                           int64_t tile_size) {
  RAN_SHARED(float, pivots, kGroupChannels);
  const int64_t group = int64_t(blockIdx.x) * blockDim.x * V, channel = group + threadIdx.x * V;
  const int64_t start = blockIdx.y * tile_size;
  const int rows = channel < view.channels ? static_cast<int>(min(tile_size, view.outer - start)) : 0;
  const int64_t first = start * view.channels + channel;
  const auto at = [&](int row) { return first + int64_t(row) * view.channels; };
  ChannelMoments<V> moments;
  float pivot[V] = {}, bias[V] = {};
  if (channel < view.channels) {
    Pack<T, V> value = load_pack<V>(x + channel), more = {};
    if constexpr (kAdds) {
      if (addition.bias) load<V>(addition.bias + channel, bias);
      if (addition.residual) more = load_pack<V>(addition.residual + channel);
      value = added(value, bias, more);
    }
    unpack(value, pivot);
  }
  if (threadIdx.y == 0)
#pragma unroll
    for (int i = 0; i < V; ++i) pivots[threadIdx.x * V + i] = pivot[i];
  for (int row = threadIdx.y; row < rows; row += kLoads * blockDim.y) {
    Pack<T, V> pack[kLoads], more[kLoads] = {};
    const int there = min(kLoads, (rows - row + static_cast<int>(blockDim.y) - 1) / static_cast<int>(blockDim.y));
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (j >= there) continue;
      pack[j] = load_pack<V>(x + at(row + j * blockDim.y));
      if constexpr (kAdds)
        if (addition.residual) more[j] = load_pack<V>(addition.residual + at(row + j * blockDim.y));
    }
    if constexpr (kAdds)
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (j >= there) continue;
        pack[j] = added(pack[j], bias, more[j]);
        store_pack<V>(addition.out + at(row + j * blockDim.y), pack[j]);
      }
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
  finish_statistics<V>(state, pivots, out, group, view, tile_size);
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
  RAN_SHARED(float, pivot, 1);
  if (threadIdx.y == 0) pivot[0] = first[0];
  Moments<float> state[1] = {};
  for (int at = threadIdx.y; at < vectors; at += kLoads * kReduceThreads) {
    float v[kLoads * V];
    const int there = min(kLoads, (vectors - at + kReduceThreads - 1) / kReduceThreads);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      float loaded[V] = {};
      if (j < there) load<V>(x + walk.offset(at + j * kReduceThreads), loaded);
#pragma unroll
      for (int i = 0; i < V; ++i) v[j * V + i] = loaded[i] - first[0];
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
        return RAN_LAUNCH(reduce_shape(view, V), stream, statistics_rows_kernel<T, V, false>, out,
                          static_cast<const T*>(x), Addition<T>{}, view, tiling(view).tile);
      return RAN_LAUNCH(reduce_shape(view, V), stream, statistics_planes_kernel<T, V>, out, static_cast<const T*>(x),
                        view, tiling(view).tile);
    });
  });
}

bool add_with_statistics_takes(const void* x, const void* bias, const void* residual, DType dtype, ChannelView view) {
  return view.numel() > 0 && view.inner == 1 && (dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16) &&
         view.channels % (dtype == DType::f32 ? 4 : 8) == 0 && aligned16(x, bias, residual);
}

cudaError_t add_with_statistics(void* sum, float* mean, float* var, const void* x, const void* bias,
                                const void* residual, DType dtype, ChannelView view, RunningStatistics running,
                                void* workspace, unsigned* counters, cudaStream_t stream) {
  if (!add_with_statistics_takes(x, bias, residual, dtype, view) || !aligned16(sum)) return cudaErrorInvalidValue;
  const StatisticsOutput out{mean, var, running, static_cast<float2*>(workspace), counters};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Addition<T> addition{static_cast<T*>(sum), static_cast<const T*>(bias), static_cast<const T*>(residual)};
    return RAN_LAUNCH(reduce_shape(view, kVector<T>), stream, statistics_rows_kernel<T, kVector<T>, true>, out,
                      static_cast<const T*>(x), addition, view, tiling(view).tile);
  });
}

}  // namespace ran::cuda
