// 2x2 max-pooling at stride 2 with one byte of index a window (torch keeps eight). As in torch, NaN is a maximum.
// Windows do not overlap, so backward writes each position once.
#include <cmath>

#include "kernels.h"
#include "planes.cuh"
#include "vec.cuh"

namespace ran::cuda {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kCellThreads, 4)
    max_pool_forward_kernel(T* __restrict__ out, uint8_t* __restrict__ index, const T* __restrict__ x, Planes planes) {
  for_each_window<V, 2>(planes, [&](const Window<2>& window) {
    float best[V];
    Pack<uint8_t, V> at = {};
#pragma unroll
    for (int i = 0; i < V; ++i) best[i] = -INFINITY;
    window.for_each([&](int64_t high, int position) {
      float value[V];
      load<V>(x + high, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const bool better = value[i] > best[i] || value[i] != value[i];
        best[i] = better ? value[i] : best[i];
        at.value[i] = static_cast<uint8_t>(better ? position : at.value[i]);
      }
    });
    store<V>(out + window.low, best);
    store_pack<V>(index + window.low, at);
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kCellThreads, 4)
    max_pool_backward_kernel(T* __restrict__ dx, const T* __restrict__ dout, const uint8_t* __restrict__ index,
                             Planes planes) {
  for_each_window<V, 2>(planes, [&](const Window<2>& window) {
    const Pack<T, V> d = load_pack<V>(dout + window.low);
    const Pack<uint8_t, V> at = load_pack<V>(index + window.low);
    window.for_each([&](int64_t high, int position) {
      Pack<T, V> value;
#pragma unroll
      for (int i = 0; i < V; ++i) value.value[i] = at.value[i] == position ? d.value[i] : from_float<T>(0.0f);
      store_pack<V>(dx + high, value);
    });
  });
}

}  // namespace

cudaError_t max_pool_forward(void* out, uint8_t* index, const void* x, DType dtype, GateShape shape,
                             cudaStream_t stream) {
  if (shape.scale != 2) return cudaErrorInvalidValue;
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Planes planes(shape);
    return with_windows<T>(planes, aligned16(out, index, x), [&](auto vector, auto) {
      constexpr int V = decltype(vector)::value;
      return RAN_LAUNCH(planes.shape(V), stream, max_pool_forward_kernel<T, V>, static_cast<T*>(out), index,
                        static_cast<const T*>(x), planes);
    });
  });
}

cudaError_t max_pool_backward(void* dx, const void* dout, const uint8_t* index, DType dtype, GateShape shape,
                              cudaStream_t stream) {
  if (shape.scale != 2) return cudaErrorInvalidValue;
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Planes planes(shape);
    return with_windows<T>(planes, aligned16(dx, dout, index), [&](auto vector, auto) {
      constexpr int V = decltype(vector)::value;
      return RAN_LAUNCH(planes.shape(V), stream, max_pool_backward_kernel<T, V>, static_cast<T*>(dx),
                        static_cast<const T*>(dout), index, planes);
    });
  });
}

}  // namespace ran::cuda
