// The attention gate with bilinear up-sampling of the mask fused in. Forward moves the trunk twice and the mask once,
// backward the trunk's size three times: the mask at the trunk's resolution and its gradient are never in memory.
#include "../common/stencil.h"
#include "kernels.h"
#include "planes.cuh"
#include "vec.cuh"

namespace ran::cuda {
namespace {

constexpr int kLowRows = 4;  // of the mask, that a thread walks down in backward

struct Bilinear {
  Planes planes;
  float ratio_y, ratio_x;  // of low to high

  explicit Bilinear(const GateShape& s)
      : planes(s), ratio_y(float(planes.low_h) / float(planes.h)), ratio_x(float(planes.low_w) / float(planes.w)) {}
};

__device__ __forceinline__ Stencil<float, int> stencil_at(int x, int low, float ratio) {
  return stencil(std::fma(ratio, static_cast<float>(x) + 0.5f, -0.5f), low);
}

template <int V>
__device__ __forceinline__ void mix(const float (&a)[V], const float (&b)[V], float weight0, float weight1,
                                    float (&mixed)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) mixed[i] = std::fma(weight0, a[i], weight1 * b[i]);
}

// A column of the mask between two of its rows, of which `top` and `bottom` are the first values.
template <int V, typename T>
__device__ __forceinline__ void mix_rows(const T* top, const T* bottom, int64_t column, Stencil<float, int> v,
                                         float (&mixed)[V]) {
  float a[V], b[V];
  load<V>(top + column, a);
  load<V>(bottom + column, b);
  mix<V>(a, b, v.weight0, v.weight1, mixed);
}

// A thread owns V values of a pixel of the trunk.
template <typename T, int V>
__global__ void __launch_bounds__(kCellThreads, 4)
    gate_bilinear_forward_kernel(T* __restrict__ out, const T* __restrict__ trunk, const T* __restrict__ mask,
                                 Bilinear bilinear) {
  const Planes& p = bilinear.planes;
  const int vectors = p.inner / V;
  for_each_cell(p.planes * p.h, p.w * vectors, [&](int64_t row, int column) {
    const auto [plane, y] = divide(row, p.h);
    const int x = column / vectors, channel = (column - x * vectors) * V;
    const auto v = stencil_at(y, p.low_h, bilinear.ratio_y), u = stencil_at(x, p.low_w, bilinear.ratio_x);
    const int64_t low_row = int64_t(p.low_w) * p.inner, at = (row * p.w + x) * p.inner + channel;
    const T* const top = mask + (plane * p.low_h + v.low0) * low_row + channel;
    const T* const bottom = mask + (plane * p.low_h + v.low1) * low_row + channel;
    float left[V], right[V], t[V];
    mix_rows<V>(top, bottom, int64_t(u.low0) * p.inner, v, left);
    mix_rows<V>(top, bottom, int64_t(u.low1) * p.inner, v, right);
    mix<V>(left, right, u.weight0, u.weight1, left);
    load<V>(trunk + at, t);
#pragma unroll
    for (int i = 0; i < V; ++i) t[i] = gate(t[i], left[i]);
    store<V>(out + at, t);
  });
}

// The first high coordinate from which on low0 is `low` or more.
__device__ __forceinline__ int start_of(int low, int low_size, int high_size, float ratio) {
  if (low <= 0) return 0;
  if (low >= low_size) return high_size;
  int x = min(static_cast<int>((low + 0.5f) / ratio - 0.5f), high_size);  // but for rounding
  while (x > 0 && stencil_at(x - 1, low_size, ratio).low0 >= low) --x;
  while (x < high_size && stencil_at(x, low_size, ratio).low0 < low) ++x;
  return x;
}

// A thread walks down a column of V values of the mask, gathering all that is up-sampled from each: of every row of the
// trunk, the pixels between the column and its neighbours to either side. The gradients of a row are added up once, for
// the mask's rows above and below it. What lies left of the column, or above the walk, is the owner's to write.
template <typename T, int V>
__global__ void __launch_bounds__(kCellThreads, 2)
    gate_bilinear_backward_kernel(T* __restrict__ dtrunk, T* __restrict__ dmask, const T* __restrict__ dout,
                                  const T* __restrict__ trunk, const T* __restrict__ mask, Bilinear bilinear) {
  const Planes& p = bilinear.planes;
  const int vectors = p.inner / V, walks = (p.low_h + kLowRows - 1) / kLowRows;
  for_each_cell(p.planes * walks, p.low_w * vectors, [&](int64_t walk_row, int column) {
    const auto [plane, walk] = divide(walk_row, walks);
    const int low_x = column / vectors, channel = (column - low_x * vectors) * V;
    const int first = walk * kLowRows, end = min(first + kLowRows, p.low_h);
    const int left_x = start_of(low_x - 1, p.low_w, p.w, bilinear.ratio_x);
    const int own_x = start_of(low_x, p.low_w, p.w, bilinear.ratio_x);
    const int end_x = start_of(low_x + 1, p.low_w, p.w, bilinear.ratio_x);
    const int64_t low_row = int64_t(p.low_w) * p.inner;
    const int64_t left_column = int64_t(max(low_x - 1, 0)) * p.inner, own_column = int64_t(low_x) * p.inner,
                  right_column = int64_t(min(low_x + 1, p.low_w - 1)) * p.inner;
    const T* const low_plane = mask + plane * p.low_h * low_row + channel;
    float carried[V] = {};  // from the trunk's rows above the mask's row
    int y = start_of(max(first - 1, 0), p.low_h, p.h, bilinear.ratio_y);
    for (int low_y = max(first - 1, 0); low_y < end; ++low_y) {
      const bool own_row = low_y >= first;
      float whole[V], below[V] = {};
#pragma unroll
      for (int i = 0; i < V; ++i) whole[i] = carried[i];
      for (; y < p.h; ++y) {
        const auto v = stencil_at(y, p.low_h, bilinear.ratio_y);
        if (v.low0 != low_y) break;
        const T *const top = low_plane + v.low0 * low_row, *const bottom = low_plane + v.low1 * low_row;
        float left[V], own[V], right[V], sum[V] = {};
        mix_rows<V>(top, bottom, left_column, v, left);
        mix_rows<V>(top, bottom, own_column, v, own);
        mix_rows<V>(top, bottom, right_column, v, right);
        for (int x = left_x; x < end_x; ++x) {
          const auto u = stencil_at(x, p.low_w, bilinear.ratio_x);
          const int64_t at = ((plane * p.h + y) * p.w + x) * p.inner + channel;
          const bool is_own = x >= own_x;
          float d[V], t[V];
          load<V>(dout + at, d);
          load<V>(trunk + at, t);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float m = std::fma(u.weight0, is_own ? own[i] : left[i], u.weight1 * (is_own ? right[i] : own[i]));
            const float gradient = gate_dmask(d[i], t[i], m);
            sum[i] = std::fma(is_own ? u.weight0 : u.weight1, gradient, sum[i]);
            if (is_own && u.low1 == u.low0) sum[i] = std::fma(u.weight1, gradient, sum[i]);  // its own neighbour
            d[i] = gate(d[i], m);
          }
          if (is_own && own_row) store<V>(dtrunk + at, d);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          whole[i] = std::fma(v.weight0, sum[i], whole[i]);
          below[i] = std::fma(v.weight1, sum[i], below[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (low_y == p.low_h - 1) whole[i] += below[i];
        carried[i] = below[i];
      }
      if (own_row) store<V>(dmask + (plane * p.low_h + low_y) * low_row + own_column + channel, whole);
    }
  });
}

}  // namespace

cudaError_t attention_gate_bilinear_forward(void* out, const void* trunk, const void* mask, DType dtype,
                                            GateShape shape, cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Bilinear bilinear(shape);
    const Planes& p = bilinear.planes;
    return with_vector<T>(aligned16(out, trunk, mask) && p.inner % kVector<T> == 0, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      return RAN_LAUNCH(cells_shape(p.planes * p.h, int64_t(p.w) * (p.inner / V)), stream,
                        gate_bilinear_forward_kernel<T, V>, static_cast<T*>(out), static_cast<const T*>(trunk),
                        static_cast<const T*>(mask), bilinear);
    });
  });
}

cudaError_t attention_gate_bilinear_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk,
                                             const void* mask, DType dtype, GateShape shape, cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Bilinear bilinear(shape);
    const Planes& p = bilinear.planes;
    return with_vector<T>(aligned16(dtrunk, dmask, dout, trunk, mask) && p.inner % kVector<T> == 0, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int64_t walks = blocks_for(p.low_h, kLowRows);
      return RAN_LAUNCH(cells_shape(p.planes * walks, int64_t(p.low_w) * (p.inner / V)), stream,
                        gate_bilinear_backward_kernel<T, V>, static_cast<T*>(dtrunk), static_cast<T*>(dmask),
                        static_cast<const T*>(dout), static_cast<const T*>(trunk), static_cast<const T*>(mask),
                        bilinear);
    });
  });
}

}  // namespace ran::cuda
