// The data gradient of 3x3 convolutions by Winograd's method: a convolution of the output's gradient with the weight
// turned by half a turn, whose outputs pass the ReLU's mask and are summed for batch normalisation's backward. A NaN or
// infinity in dout spreads as one in the forward pass's x does.
#include "kernels.h"
#include "tables.h"
#include "winograd_convolve.h"

namespace ran::cpu::RAN_ISA {

#if defined(RAN_FMA)

namespace {

// dx of the convolution alone.
template <class F, typename T>
void plain_gradient(T* dx, const T* dout, const T* weight, const ConvShape& s) {
  const TileGrid<F::m> grid(s);
  const ConvolvePlan plan(F::n * F::n, grid.count, s.co, s.ci);
  const auto output = [&](int64_t, const Place& at, Vec<float>(&y)[F::m][F::m], int64_t c, int lanes, int64_t) {
    T* const first = dx + ((at.image * s.h + at.y) * s.w + at.x) * s.ci + c;
    for_pixels<F::m>(at, [&](int i, int j) RAN_ALWAYS { store(first + (i * s.w + j) * s.ci, y[i][j], lanes); });
  };
  convolve<F>(dout, Weight<T>{weight, s.co, s.ci, true}, nullptr, s, plan, AsItIs(), output,
              [&](int64_t begin, int64_t end, int64_t part, int64_t parts) {
                prefetch_tiles<true>(Touched<T>{dx, s.ci, s.ci, 0}, grid, begin, end, part, parts);
              });
}

template <class F, typename T>
void data_gradient(T* dz, float* sum_dz, float* sum_dz_xhat, const T* dout, const T* x, const T* weight,
                   const ConvShape& s, BatchNorm<float> bn) {
  const TileGrid<F::m> grid(s);
  const ConvolvePlan plan(F::n * F::n, grid.count, s.co, s.ci);
  const ScaleShiftTable<float> table(bn, s.ci);
  std::vector<float> partial(size_t(plan.blocks.count() * 2 * s.ci), 0.0f);
  const auto output = [&](int64_t, const Place& at, Vec<float>(&y)[F::m][F::m], int64_t c, int lanes, int64_t block) {
    float* const sums = partial.data() + block * 2 * s.ci + c;
    const Vec<float> scale = load(table.scale + c, lanes), shift = load(table.shift + c, lanes);
    const Vec<float> mean = load(bn.mean + c, lanes);
    const int64_t first = ((at.image * s.h + at.y) * s.w + at.x) * s.ci + c;
    Vec<float> s0{}, s1{};  // of this tile: short sums round less
    for_pixels<F::m>(at, [&](int i, int j) RAN_ALWAYS {
      const int64_t to = first + (i * s.w + j) * s.ci;
      const Vec<float> value = load(x + to, lanes);
      const Vec<float> masked = relu_backward(y[i][j], fma(value, scale, shift));
      store(dz + to, masked, lanes);
      const Vec<float> stored = rounded_to<T>(masked);  // the sums are of what the next pass reads
      s0 += stored;
      s1 = fma(stored, value - mean, s1);
    });
    store(sums, load(sums, lanes) + s0, lanes);
    store(sums + s.ci, load(sums + s.ci, lanes) + s1, lanes);
  };
  convolve<F>(dout, Weight<T>{weight, s.co, s.ci, true}, nullptr, s, plan, AsItIs(), output,
              [&](int64_t begin, int64_t end, int64_t part, int64_t parts) {
                prefetch_tiles<true>(Touched<T>{dz, s.ci, s.ci, 0}, grid, begin, end, part, parts);
                prefetch_tiles<false>(Touched<T>{x, s.ci, s.ci, 0}, grid, begin, end, part, parts);
              });
  finish_sums(sum_dz, sum_dz_xhat, partial.data(), plan.blocks.count(), s.ci, bn);
}

}  // namespace

void conv3x3_data_gradient(Conv3x3 tile, void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x,
                           const void* weight, DType dtype, ConvShape s, const BatchNorm<void>* bn) {
  with_float_acc(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (!bn)
      return (tile == Conv3x3::f4x4 ? plain_gradient<Winograd<4>, T>
                                    : plain_gradient<Winograd<2>, T>)(static_cast<T*>(dz), static_cast<const T*>(dout),
                                                                      static_cast<const T*>(weight), s);
    (tile == Conv3x3::f4x4 ? data_gradient<Winograd<4>, T>
                           : data_gradient<Winograd<2>, T>)(static_cast<T*>(dz), sum_dz, sum_dz_xhat,
                                                            static_cast<const T*>(dout), static_cast<const T*>(x),
                                                            static_cast<const T*>(weight), s, typed<float>(*bn));
  });
}

#else

void conv3x3_data_gradient(Conv3x3, void*, float*, float*, const void*, const void*, const void*, DType, ConvShape,
                           const BatchNorm<void>*) {}

#endif

}  // namespace ran::cpu::RAN_ISA
