// out = lower up-sampled (nearest) and cropped, + skip; backward sums each window (gather form, no atomics).
#include "kernels.h"
#include "planes.cuh"
#include "vec.cuh"

namespace ran::cuda {
namespace {

template <typename T, int V, int kScale>
__global__ void __launch_bounds__(kCellThreads, 4)
    upsample_add_forward_kernel(T* __restrict__ out, const T* __restrict__ lower, const T* __restrict__ skip,
                                Planes planes) {
  for_each_window<V, kScale>(planes, [&](const Window<kScale>& window) {
    float value[V];
    load<V>(lower + window.low, value);
    window.for_each([&](int64_t high, int) {
      float sum[V] = {};
      if (skip) load<V>(skip + high, sum);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = skip ? sum[i] + value[i] : value[i];
      store<V>(out + high, sum);
    });
  });
}

template <typename T, int V, int kScale>
__global__ void __launch_bounds__(kCellThreads, 4)
    upsample_add_backward_kernel(T* __restrict__ dlower, const T* __restrict__ dout, Planes planes) {
  for_each_window<V, kScale>(planes, [&](const Window<kScale>& window) {
    float sum[V] = {};
    window.for_each([&](int64_t high, int) {
      float d[V];
      load<V>(dout + high, d);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += d[i];
    });
    store<V>(dlower + window.low, sum);
  });
}

}  // namespace

cudaError_t upsample_add_forward(void* out, const void* lower, const void* skip, DType dtype, GateShape shape,
                                 cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Planes planes(shape);
    return with_windows<T>(planes, aligned16(out, lower, skip), [&](auto vector, auto scale) {
      constexpr int V = decltype(vector)::value, S = decltype(scale)::value;
      return RAN_LAUNCH(planes.shape(V), stream, upsample_add_forward_kernel<T, V, S>, static_cast<T*>(out),
                        static_cast<const T*>(lower), static_cast<const T*>(skip), planes);
    });
  });
}

cudaError_t upsample_add_backward(void* dlower, const void* dout, DType dtype, GateShape shape, cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Planes planes(shape);
    return with_windows<T>(planes, aligned16(dlower, dout), [&](auto vector, auto scale) {
      constexpr int V = decltype(vector)::value, S = decltype(scale)::value;
      return RAN_LAUNCH(planes.shape(V), stream, upsample_add_backward_kernel<T, V, S>, static_cast<T*>(dlower),
                        static_cast<const T*>(dout), planes);
    });
  });
}

}  // namespace ran::cuda
