// The attention gate: out = (1 + sigmoid(mask)) * trunk. Bound by memory: 3 tensors move forward, 5 backward.
#include "../common/formulas.h"
#include "kernels.h"
#include "planes.cuh"
#include "vec.cuh"

namespace ran::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // vectors a thread, for loads in flight

// Calls body(offset) for the thread's whole vectors of a flat array, and scalar(offset) for the ragged end.
template <int V, typename Body, typename Scalar>
__device__ __forceinline__ void for_each_vector(int64_t count, Body&& body, Scalar&& scalar) {
  const int64_t base = int64_t(blockIdx.x) * (kThreads * kUnroll * V);
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t offset = base + (k * kThreads + threadIdx.x) * V;
    if (offset + V <= count) {
      body(offset);
    } else {
      for (int64_t i = offset; i < count; ++i) scalar(i);
    }
  }
}

template <int V, typename T>
__device__ __forceinline__ void gate_vector(T* out, const T* trunk, const T* mask) {
  float t[V], m[V];
  load<V>(trunk, t);
  load<V>(mask, m);
#pragma unroll
  for (int i = 0; i < V; ++i) t[i] = gate(t[i], m[i]);
  store<V>(out, t);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    gate_forward_kernel(T* __restrict__ out, const T* __restrict__ trunk, const T* __restrict__ mask, int64_t count) {
  for_each_vector<V>(
      count, [&](int64_t at) { gate_vector<V>(out + at, trunk + at, mask + at); },
      [&](int64_t at) { gate_vector<1>(out + at, trunk + at, mask + at); });
}

template <int V, typename T>
__device__ __forceinline__ void gate_gradients(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask) {
  float d[V], t[V], m[V], dt[V], dm[V];
  load<V>(dout, d);
  load<V>(trunk, t);
  load<V>(mask, m);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    dt[i] = gate(d[i], m[i]);
    dm[i] = gate_dmask(d[i], t[i], m[i]);
  }
  store<V>(dtrunk, dt);
  store<V>(dmask, dm);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    gate_backward_kernel(T* __restrict__ dtrunk, T* __restrict__ dmask, const T* __restrict__ dout,
                         const T* __restrict__ trunk, const T* __restrict__ mask, int64_t count) {
  for_each_vector<V>(
      count, [&](int64_t at) { gate_gradients<V>(dtrunk + at, dmask + at, dout + at, trunk + at, mask + at); },
      [&](int64_t at) { gate_gradients<1>(dtrunk + at, dmask + at, dout + at, trunk + at, mask + at); });
}

// With an up-sampled mask a thread owns V mask values and the window of the trunk above each: one sigmoid for all of
// it.
template <typename T, int V, int kScale>
__global__ void __launch_bounds__(kCellThreads, 4)
    gate_upsampled_forward_kernel(T* __restrict__ out, const T* __restrict__ trunk, const T* __restrict__ mask,
                                  Planes planes) {
  for_each_window<V, kScale>(planes, [&](const Window<kScale>& window) {
    float m[V], factor[V];
    load<V>(mask + window.low, m);
#pragma unroll
    for (int i = 0; i < V; ++i) factor[i] = gate(1.0f, m[i]);
    window.for_each([&](int64_t high, int) {
      float t[V];
      load<V>(trunk + high, t);
#pragma unroll
      for (int i = 0; i < V; ++i) t[i] *= factor[i];
      store<V>(out + high, t);
    });
  });
}

template <typename T, int V, int kScale>
__global__ void __launch_bounds__(kCellThreads, 4)
    gate_upsampled_backward_kernel(T* __restrict__ dtrunk, T* __restrict__ dmask, const T* __restrict__ dout,
                                   const T* __restrict__ trunk, const T* __restrict__ mask, Planes planes) {
  for_each_window<V, kScale>(planes, [&](const Window<kScale>& window) {
    float m[V], factor[V], product[V] = {};
    load<V>(mask + window.low, m);
#pragma unroll
    for (int i = 0; i < V; ++i) factor[i] = gate(1.0f, m[i]);
    window.for_each([&](int64_t high, int) {
      float d[V], t[V];
      load<V>(dout + high, d);
      load<V>(trunk + high, t);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        product[i] = std::fma(d[i], t[i], product[i]);
        d[i] *= factor[i];
      }
      store<V>(dtrunk + high, d);
    });
#pragma unroll
    for (int i = 0; i < V; ++i) m[i] = gate_dmask(product[i], 1.0f, m[i]);
    store<V>(dmask + window.low, m);
  });
}

LaunchShape flat_shape(int64_t count, int vector) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks_for(count, int64_t(kThreads) * kUnroll * vector)));
  shape.block = dim3(kThreads);
  return shape;
}

}  // namespace

cudaError_t attention_gate_forward(void* out, const void* trunk, const void* mask, DType dtype, GateShape shape,
                                   cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto o = static_cast<T*>(out);
    const auto t = static_cast<const T*>(trunk), m = static_cast<const T*>(mask);
    const bool aligned = aligned16(out, trunk, mask);
    if (shape.scale == 1)
      return with_vector<T>(aligned, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        return RAN_LAUNCH(flat_shape(shape.numel(), V), stream, gate_forward_kernel<T, V>, o, t, m, shape.numel());
      });
    const Planes planes(shape);
    return with_windows<T>(planes, aligned, [&](auto vector, auto scale) {
      constexpr int V = decltype(vector)::value, S = decltype(scale)::value;
      return RAN_LAUNCH(planes.shape(V), stream, gate_upsampled_forward_kernel<T, V, S>, o, t, m, planes);
    });
  });
}

cudaError_t attention_gate_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask,
                                    DType dtype, GateShape shape, cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto dt = static_cast<T*>(dtrunk), dm = static_cast<T*>(dmask);
    const auto d = static_cast<const T*>(dout), t = static_cast<const T*>(trunk), m = static_cast<const T*>(mask);
    const bool aligned = aligned16(dtrunk, dmask, dout, trunk, mask);
    if (shape.scale == 1)
      return with_vector<T>(aligned, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        return RAN_LAUNCH(flat_shape(shape.numel(), V), stream, gate_backward_kernel<T, V>, dt, dm, d, t, m,
                          shape.numel());
      });
    const Planes planes(shape);
    return with_windows<T>(planes, aligned, [&](auto vector, auto scale) {
      constexpr int V = decltype(vector)::value, S = decltype(scale)::value;
      return RAN_LAUNCH(planes.shape(V), stream, gate_upsampled_backward_kernel<T, V, S>, dt, dm, d, t, m, planes);
    });
  });
}

}  // namespace ran::cuda
