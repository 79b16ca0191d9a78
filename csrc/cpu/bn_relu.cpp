// Batch normalisation + ReLU, forward and backward, over dense NCHW and channels_last tensors.
//
// Statistics are taken in two passes over tiles that fit a core's cache, and the tiles' merged (moments.h).
#include "bn_passes.h"

namespace ran::cpu::RAN_ISA {
namespace {

struct Relu {
  static constexpr bool kKeeps = false;
  template <typename V>
  V value(V z) const {
    return relu(z);
  }
  template <typename V>
  V gradient(V dout, V z) const {
    return relu_backward(dout, z);
  }
};
const auto make_relu = [](auto*) { return Relu{}; };

template <typename T, typename A = Acc<T>>
void stats_rows(A* mean, A* var, double* exact, const T* x, ChannelView v) {
  const int64_t count = tiles_of(v.outer, kTileRows);
  std::vector<double> tiles(size_t(count * 3 * v.channels));
  for_row_tiles<A>(v, [&](int64_t tile, int64_t row, int64_t rows, int64_t c, int64_t channels) {
    tile_moments(tiles.data() + tile * 3 * v.channels, x, v.channels, row, rows, c, channels);
  });
  merge_tiles(mean, var, exact, tiles.data(), count, v.channels,
              [&](int64_t tile) { return std::min(kTileRows, v.outer - tile * kTileRows); });
}

template <typename T, typename A = Acc<T>>
void stats_planes(A* mean, A* var, double* exact, const T* x, ChannelView v) {
  const int64_t tiles_each = tiles_of(v.inner, kPlaneTile);
  const auto size_of = [&](int64_t tile) { return std::min(kPlaneTile, v.inner - tile % tiles_each * kPlaneTile); };
  std::vector<double> tiles(size_t(v.outer * tiles_each * 3 * v.channels));
  for_planes(v, [&](int64_t plane, int64_t c, int64_t at) {
    for (int64_t i = 0; i < tiles_each; ++i) {
      double* const to = tiles.data() + (plane / v.channels * tiles_each + i) * 3 * v.channels + c;
      run_moments(to, v.channels, x + at + i * kPlaneTile, size_of(i));
    }
  });
  merge_tiles(mean, var, exact, tiles.data(), v.outer * tiles_each, v.channels, size_of);
}

}  // namespace

void batch_norm_stats(void* mean, void* var, double* exact, const void* x, DType dtype, ChannelView v) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto run = v.inner == 1 ? &stats_rows<T> : &stats_planes<T>;
    run(static_cast<Acc<T>*>(mean), static_cast<Acc<T>*>(var), exact, static_cast<const T*>(x), v);
  });
}

void bn_relu_forward(void* out, const void* x, DType dtype, ChannelView v, BatchNorm<void> bn) {
  bn_forward(make_relu, out, x, dtype, v, bn);
}

void bn_relu_backward_reduce(void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                             ChannelView v, BatchNorm<void> bn) {
  bn_backward_reduce(make_relu, nullptr, sum_dz, sum_dz_xhat, dout, x, dtype, v, bn);
}

void bn_relu_backward_apply(void* dx, const void* dout, Rows x, const void* residual, const void* sum_dz,
                            const void* sum_dz_xhat, double count, DType dtype, ChannelView v, BatchNorm<void> bn) {
  bn_backward_apply(make_relu, dx, dout, x, residual, sum_dz, sum_dz_xhat, count, dtype, v, bn);
}

}  // namespace ran::cpu::RAN_ISA
