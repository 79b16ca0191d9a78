// The passes of BN-ReLU that move tensors and reduce nothing: out = relu(bn(x)), and dx.
#include "batch_norm.cuh"
#include "pieces.cuh"

namespace ran::cuda {
namespace {

constexpr int kApplyThreads = 256;
constexpr int64_t kApplyBlocks = 1024;  // so that each thread's coefficients serve many rows

// channels_last: threads stay on their channels and go down the rows.
LaunchShape rows_shape(const ChannelView& view, int vector, int unroll) {
  const int64_t columns = view.channels / vector;
  unsigned width = 1;
  while (width < 32 && width < columns) width *= 2;
  LaunchShape shape;
  shape.block = dim3(width, kApplyThreads / width);
  shape.grid.y = static_cast<unsigned>(blocks_for(columns, width));
  const int64_t most = std::max<int64_t>(1, kApplyBlocks / shape.grid.y);
  shape.grid.x = static_cast<unsigned>(std::min(most, blocks_for(view.outer, int64_t(shape.block.y) * unroll)));
  return shape;
}

template <typename T, int V>
__global__ void __launch_bounds__(kApplyThreads, 2)
    forward_rows_kernel(T* __restrict__ out, const T* __restrict__ x, ChannelView view, BatchNorm<float> norm) {
  const int64_t channel = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (channel >= view.channels) return;
  const ChannelScales<V> scales(norm, channel);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < view.outer; row += step * kLoads) {
    Pack<T, V> pack[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (row + j * step < view.outer) pack[j] = load_pack<V>(x + (row + j * step) * view.channels + channel);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (row + j * step >= view.outer) break;
      float v[V];
      unpack(pack[j], v);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = relu(scales.z(i, v[i]));
      store<V>(out + (row + j * step) * view.channels + channel, v);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kCellThreads, 4)
    forward_planes_kernel(T* __restrict__ out, const T* __restrict__ x, ChannelView view, BatchNorm<float> norm) {
  for_each_cell(view.outer * view.channels, static_cast<int>(view.inner / V), [&](int64_t plane, int column) {
    const ChannelScales<1> scales(norm, divide(plane, static_cast<int>(view.channels)).remainder);
    const int64_t at = plane * view.inner + int64_t(column) * V;
    float v[V];
    load<V>(x + at, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = relu(scales.z(0, v[i]));
    store<V>(out + at, v);
  });
}

struct Sums {
  const float *dz, *dz_xhat;  // null: the statistics did not depend on x
  float count;
};

template <int V>
struct DxScales {
  ChannelScales<V> scales;
  float a[V], b[V], c[V], mean[V];
  bool batch_statistics;

  __device__ __forceinline__ DxScales(const BatchNorm<float>& norm, const Sums& sums, int64_t channel)
      : scales(norm, channel), batch_statistics(sums.dz) {
    float weight[V], var[V], dz[V], dz_xhat[V];
    load_channels<V>(norm.mean, channel, 0.0f, mean);
    load_channels<V>(norm.var, channel, 1.0f, var);
    load_channels<V>(norm.weight, channel, 1.0f, weight);
    load_channels<V>(sums.dz, channel, 0.0f, dz);
    load_channels<V>(sums.dz_xhat, channel, 0.0f, dz_xhat);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const auto k =
          dx_coefficients(mean[i], var[i], weight[i], static_cast<float>(norm.eps), dz[i], dz_xhat[i], sums.count);
      a[i] = k.a;
      b[i] = k.b;
      c[i] = k.c;
    }
  }
  __device__ __forceinline__ float operator()(int i, float dout, float x) const {
    const float dz = relu_backward(dout, scales.z(i, x));
    // b and c are 0 without batch statistics, but b * NaN is not.
    return batch_statistics ? dx(dz, x, DxCoefficients<float>{a[i], b[i], c[i], mean[i]}) : a[i] * dz;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kApplyThreads, 2)
    backward_pieces_kernel(T* __restrict__ dx, const T* __restrict__ dout, const Pieces<T> pieces, ChannelView view,
                           BatchNorm<float> norm, Sums sums) {
  const int64_t channel = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (channel >= view.channels) return;
  const DxScales<V> scales(norm, sums, channel);
  const Column<T> x = column_of(pieces, static_cast<int>(channel));
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
#pragma unroll 2
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < view.outer; row += step) {
    float d[V], v[V];
    load<V>(dout + row * view.channels + channel, d);
    load<V>(x.data + row * x.pitch, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = scales(i, d[i], v[i]);
    store<V>(dx + row * view.channels + channel, v);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kApplyThreads, 2)
    backward_rows_kernel(T* __restrict__ dx, const T* __restrict__ dout, const T* __restrict__ x,
                         const T* __restrict__ residual, ChannelView view, BatchNorm<float> norm, Sums sums) {
  const int64_t channel = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (channel >= view.channels) return;
  const DxScales<V> scales(norm, sums, channel);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
#pragma unroll 2
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < view.outer; row += step) {
    const int64_t at = row * view.channels + channel;
    float d[V], v[V], r[V] = {};
    load<V>(dout + at, d);
    load<V>(x + at, v);
    if (residual) load<V>(residual + at, r);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = residual ? scales(i, d[i], v[i]) + r[i] : scales(i, d[i], v[i]);
    store<V>(dx + at, v);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kCellThreads, 4)
    backward_planes_kernel(T* __restrict__ dx, const T* __restrict__ dout, const T* __restrict__ x,
                           const T* __restrict__ residual, ChannelView view, BatchNorm<float> norm, Sums sums) {
  for_each_cell(view.outer * view.channels, static_cast<int>(view.inner / V), [&](int64_t plane, int column) {
    const DxScales<1> scales(norm, sums, divide(plane, static_cast<int>(view.channels)).remainder);
    const int64_t at = plane * view.inner + int64_t(column) * V;
    float d[V], v[V], r[V] = {};
    load<V>(dout + at, d);
    load<V>(x + at, v);
    if (residual) load<V>(residual + at, r);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = residual ? scales(0, d[i], v[i]) + r[i] : scales(0, d[i], v[i]);
    store<V>(dx + at, v);
  });
}

LaunchShape planes_shape(const ChannelView& view, int vector) {
  return cells_shape(view.outer * view.channels, view.inner / vector);
}

}  // namespace

cudaError_t bn_relu_forward(void* out, const void* x, DType dtype, ChannelView view, BatchNorm<float> norm,
                            cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  const bool rows = view.inner == 1;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors = aligned16(out, x) && (rows ? view.channels : view.inner) % kVector<T> == 0;
    return with_vector<T>(vectors, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (rows)
        return RAN_LAUNCH(rows_shape(view, V, kLoads), stream, forward_rows_kernel<T, V>, static_cast<T*>(out),
                          static_cast<const T*>(x), view, norm);
      return RAN_LAUNCH(planes_shape(view, V), stream, forward_planes_kernel<T, V>, static_cast<T*>(out),
                        static_cast<const T*>(x), view, norm);
    });
  });
}

cudaError_t bn_relu_backward_apply(void* dx, const void* dout, Rows x, const float* sum_dz, const float* sum_dz_xhat,
                                   const void* residual, double count, DType dtype, ChannelView view,
                                   BatchNorm<float> norm, cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  const bool rows = view.inner == 1;
  const Sums sums{sum_dz, sum_dz_xhat, static_cast<float>(count)};
  if (x.pieces && (!rows || residual || !reads_pieces(x) || !aligned16(dx, dout))) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (x.pieces) {
      if constexpr (sizeof(T) == 2)
        return RAN_LAUNCH(rows_shape(view, 8, 1), stream, backward_pieces_kernel<T, 8>, static_cast<T*>(dx),
                          static_cast<const T*>(dout), pieces_of<T>(x), view, norm, sums);
      else
        return cudaErrorInvalidValue;
    }
    const bool vectors = aligned16(dx, dout, x.data, residual) && (rows ? view.channels : view.inner) % kVector<T> == 0;
    return with_vector<T>(vectors, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (rows)
        return RAN_LAUNCH(rows_shape(view, V, 1), stream, backward_rows_kernel<T, V>, static_cast<T*>(dx),
                          static_cast<const T*>(dout), static_cast<const T*>(x.data), static_cast<const T*>(residual),
                          view, norm, sums);
      return RAN_LAUNCH(planes_shape(view, V), stream, backward_planes_kernel<T, V>, static_cast<T*>(dx),
                        static_cast<const T*>(dout), static_cast<const T*>(x.data), static_cast<const T*>(residual),
                        view, norm, sums);
    });
  });
}

}  // namespace ran::cuda
