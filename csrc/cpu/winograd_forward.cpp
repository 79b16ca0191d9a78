// 3x3 convolutions (stride 1, padding 1, channels_last) by Winograd's method: the forward pass, batch
// normalisation and ReLU in the input's load, bias, residual, ReLU and the next normalisation's statistics in the
// output. A NaN or infinity in x may make NaN of the whole of each m x m tile of outputs that its 3x3 neighbours touch.
#include "kernels.h"
#include "tables.h"
#include "winograd_convolve.h"
#include "winograd_moments.h"

namespace ran::cpu::RAN_ISA {

#if defined(RAN_FMA)

namespace {

template <class F, typename T, typename Activate>
void forward(T* out, float* out_mean, float* out_var, const T* x, const T* weight, const float* panels,
             const float* bias, const T* residual, bool with_relu, const ConvShape& s, const Activate& activate) {
  const TileGrid<F::m> grid(s);
  const ConvolvePlan plan(F::n * F::n, grid.count, s.ci, s.co);
  TileMoments moments(out_mean ? plan.blocks.count() : 0, s.co);
  const auto pixels_before = [&](int64_t tile) {  // of an image-major order of tiles
    const Place at = grid.at(tile);
    return (at.image * s.h + at.y) * s.w + at.x * at.rows;
  };
  const auto output = [&](int64_t row, const Place& at, Vec<float>(&y)[F::m][F::m], int64_t c, int lanes,
                          int64_t block) {
    const Vec<float> added = bias ? load(bias + c, lanes) : Vec<float>{};
    const int64_t first = ((at.image * s.h + at.y) * s.w + at.x) * s.co + c;
    for_pixels<F::m>(at, [&](int i, int j) RAN_ALWAYS {
      const int64_t to = first + (i * s.w + j) * s.co;
      Vec<float> value = y[i][j] + added;
      if (residual) value += load(residual + to, lanes);
      value = with_relu ? relu(value) : value;
      store(out + to, value, lanes);
      y[i][j] = rounded_to<T>(value);  // the statistics are of what the next pass reads
    });
    if (!out_mean) return;
    const int64_t tile = block * plan.blocks.block + row;
    moments.add(y, at, pixels_before(tile) - pixels_before(tile - row), c, lanes, block);
  };
  convolve<F>(x, Weight<T>{weight, s.co, s.ci, false}, panels, s, plan, activate, output,
              [&](int64_t begin, int64_t end, int64_t part, int64_t parts) {
                prefetch_tiles<true>(Touched<T>{out, s.co, s.co, 0}, grid, begin, end, part, parts);
                if (residual) prefetch_tiles<false>(Touched<T>{residual, s.co, s.co, 0}, grid, begin, end, part, parts);
              });
  if (out_mean)
    moments.finish(out_mean, out_var, [&](int64_t block) {
      const int64_t end = std::min(grid.count, (block + 1) * plan.blocks.block);
      return (end == grid.count ? s.pixels() : pixels_before(end)) - pixels_before(block * plan.blocks.block);
    });
}

}  // namespace

int64_t conv3x3_panels_size(Conv3x3 tile, ConvShape s) {
  const int64_t n = int(tile) + 2;
  return n * n * Panels(Weight<float>{nullptr, s.co, s.ci, false}).step();
}

void conv3x3_pack(Conv3x3 tile, float* panels, const void* weight, DType dtype, ConvShape s) {
  with_float_acc(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Weight<T> w{static_cast<const T*>(weight), s.co, s.ci, false};
    tile == Conv3x3::f4x4 ? pack_weight<Winograd<4>>(panels, w) : pack_weight<Winograd<2>>(panels, w);
  });
}

void conv3x3_forward(Conv3x3 tile, void* out, float* out_mean, float* out_var, const void* x, const void* weight,
                     const float* panels, const float* bias, const void* residual, bool with_relu, DType dtype,
                     ConvShape s, const BatchNorm<void>* bn) {
  const auto run = [&](const auto& activate) {
    with_float_acc(dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      using Activate = std::decay_t<decltype(activate)>;
      (tile == Conv3x3::f4x4
           ? forward<Winograd<4>, T, Activate>
           : forward<Winograd<2>, T, Activate>)(static_cast<T*>(out), out_mean, out_var, static_cast<const T*>(x),
                                                static_cast<const T*>(weight), panels, bias,
                                                static_cast<const T*>(residual), with_relu, s, activate);
    });
  };
  if (!bn) return run(AsItIs());
  const ScaleShiftTable<float> table(typed<float>(*bn), s.ci);
  run(ScaleShiftRelu{table.scale, table.shift});
}

#else

int64_t conv3x3_panels_size(Conv3x3, ConvShape) { return 0; }
void conv3x3_pack(Conv3x3, float*, const void*, DType, ConvShape) {}
void conv3x3_forward(Conv3x3, void*, float*, float*, const void*, const void*, const float*, const float*, const void*,
                     bool, DType, ConvShape, const BatchNorm<void>*) {}

#endif

}  // namespace ran::cpu::RAN_ISA
