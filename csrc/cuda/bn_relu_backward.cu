// Backward of BN-ReLU for tensors of any size: the two sums over a channel, then dx. The ReLU's mask is computed again
// from x by forward's own expression.
#include "batch_norm.cuh"

namespace ran::cuda {
namespace {

struct SumsOutput {
  float *sum_dz, *sum_dz_xhat;
  float2* workspace;
  unsigned* counters;
};

template <int V>
__device__ __forceinline__ void finish_sums(GradientSums (&state)[V], const SumsOutput& out,
                                            const BatchNorm<float>& norm, int64_t first, int64_t channels) {
  RAN_SHARED(GradientSums, scratch, kReduceThreads);
  RAN_SHARED(unsigned, flag, 1);
  const auto read = [](float2 partial, int) { return GradientSums{partial.x, partial.y}; };
  const auto finish = [&](int64_t channel, GradientSums s) {
    const float deviation = std::sqrt(norm.var[channel] + static_cast<float>(norm.eps));
    out.sum_dz[channel] = s.dz;
    out.sum_dz_xhat[channel] = s.dz_xhat / deviation;
  };
  reduce_tiles<V>(state, out.workspace, out.counters, first, channels, scratch, flag, read, finish);
}

// Until the end dz_xhat is the sum of dz * (x - mean).
template <int V>
__device__ __forceinline__ void add_gradient(GradientSums& sum, int i, float dout, float x, float mean,
                                             const ChannelScales<V>& scales) {
  const float dz = relu_backward(dout, scales.z(i, x));
  sum.dz += dz;
  sum.dz_xhat = std::fma(dz, x - mean, sum.dz_xhat);
}

template <typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, 2)
    backward_reduce_rows_kernel(SumsOutput out, const T* __restrict__ dout, const T* __restrict__ x, ChannelView view,
                                BatchNorm<float> norm, int64_t tile_size) {
  const int64_t group = int64_t(blockIdx.x) * blockDim.x * V, channel = group + threadIdx.x * V;
  GradientSums state[V] = {};
  if (channel < view.channels) {
    const int64_t start = blockIdx.y * tile_size, base = start * view.channels + channel;
    const int rows = static_cast<int>(min(tile_size, view.outer - start));
    const ChannelScales<V> scales(norm, channel);
    float mean[V];
    load_channels<V>(norm.mean, channel, 0.0f, mean);
    constexpr int kRows = kLoads / 2;  // of two tensors
    for (int row = threadIdx.y; row < rows; row += kRows * blockDim.y) {
      Pack<T, V> d[kRows], v[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int at = row + j * blockDim.y;
        if (at >= rows) continue;
        d[j] = load_pack<V>(dout + base + at * view.channels);
        v[j] = load_pack<V>(x + base + at * view.channels);
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        if (row + j * static_cast<int>(blockDim.y) < rows)
#pragma unroll
          for (int i = 0; i < V; ++i)
            add_gradient(state[i], i, to_float(d[j].value[i]), to_float(v[j].value[i]), mean[i], scales);
    }
  }
  finish_sums<V>(state, out, norm, group, view.channels);
}

template <typename T, int V>
__global__ void __launch_bounds__(kReduceThreads, 2)
    backward_reduce_planes_kernel(SumsOutput out, const T* __restrict__ dout, const T* __restrict__ x, ChannelView view,
                                  BatchNorm<float> norm, int64_t tile_size) {
  const int64_t channel = blockIdx.x, start = blockIdx.y * tile_size;
  const int vectors = static_cast<int>(min(tile_size, view.outer * view.inner - start) / V);
  const ChannelWalk<V> walk(view, channel, start);
  const ChannelScales<1> scales(norm, channel);
  const float mean = norm.mean[channel];
  GradientSums state[1] = {};
#pragma unroll 2
  for (int at = threadIdx.y; at < vectors; at += kReduceThreads) {
    float d[V], v[V];
    load<V>(dout + walk.offset(at), d);
    load<V>(x + walk.offset(at), v);
#pragma unroll
    for (int i = 0; i < V; ++i) add_gradient(state[0], 0, d[i], v[i], mean, scales);
  }
  finish_sums<1>(state, out, norm, channel, view.channels);
}

}  // namespace

cudaError_t bn_relu_backward_reduce(float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                                    ChannelView view, BatchNorm<float> norm, void* workspace, unsigned* counters,
                                    cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  const bool rows = view.inner == 1;
  const SumsOutput out{sum_dz, sum_dz_xhat, static_cast<float2*>(workspace), counters};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors = aligned16(dout, x) && (rows ? view.channels : view.inner) % kVector<T> == 0;
    return with_vector<T>(vectors, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (rows)
        return RAN_LAUNCH(reduce_shape(view, V), stream, backward_reduce_rows_kernel<T, V>, out,
                          static_cast<const T*>(dout), static_cast<const T*>(x), view, norm, tiling(view).tile);
      return RAN_LAUNCH(reduce_shape(view, V), stream, backward_reduce_planes_kernel<T, V>, out,
                        static_cast<const T*>(dout), static_cast<const T*>(x), view, norm, tiling(view).tile);
    });
  });
}

}  // namespace ran::cuda
