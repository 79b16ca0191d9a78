// The gradient of a 3x3 convolution's input, with the ReLU's mask and both sums of batch normalisation's backward pass
// in the epilogue. It is a convolution of dy with the taps turned round; at stride 2, one for each parity of the
// input's rows and columns, with the taps that reach it.
#include "conv3x3_product.cuh"
#include "conv_dgrad_end.cuh"

namespace ran::cuda {
namespace conv3x3 {
namespace {

template <typename T>
struct DgradArgs {
  HaloProductArgs<T> product;
  int height, width;  // of x
  T* dz;
  const T* x;
  BatchNorm<float> norm;
  GradientSums* partials;  // [gridDim.x][columns]
};

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2) dgrad3x3_kernel(const DgradArgs<T> args) {
  HaloProduct<Tile, T, false, true> product(args.product, dynamic_shared<T>());
  product.start();
  const int columns = args.product.columns, column = product.first_column() + 8 * threadIdx.x;
  const auto table = ColumnTable::fill<Tile::kColumns>(product.table(), args.norm, product.first_column(), columns);
  const Shared<int> pixels = product.row_pixels();
  GradientSums total[8] = {};

  const auto fetch_x = [&](int row) {
    const int pixel = pixels[row];
    const bool wanted = pixel >= 0 && column < columns;
    return wanted ? load_pack<8>(args.x + static_cast<int64_t>(pixel) * columns + column) : Pack<T, 8>{};
  };
  for (int tile = blockIdx.x; tile < args.product.row_tiles; tile += gridDim.x) {
    typename decltype(product)::Sums sums;
    product.run(sums);
    product.place_rows(tile, args.height, args.width);
    const ColumnMask mask = table.mask();
    visit_rows<Tile>(product.stage(), sums, 0, fetch_x, [&](int row, const Pack<T, 8>& x, float (&dz)[8]) {
      const int pixel = pixels[row];
      if (pixel >= 0 && column < columns)
        mask.store(args.dz + static_cast<int64_t>(pixel) * columns + column, x, dz, total);
    });
  }
  leave_partials<Tile>(total, args.partials, product.first_column(), columns, product.stage());
}

template <typename T>
cudaError_t dgrad(const Conv3x3Dgrad& p, cudaStream_t stream) {
  const Conv3x3Shape& s = p.shape;
  const int c_in = static_cast<int>(s.c_in), c_out = static_cast<int>(s.c_out);
  auto* partials = static_cast<GradientSums*>(p.workspace);
  int blocks = 0;
  if (s.n > 0) {
    for (const Plan& plan : dgrad_plans(s)) {
      const DgradArgs<T> args{
          {{static_cast<const T*>(p.dy), c_out}, static_cast<const T*>(p.weight), c_in, plan.row_tiles, plan.patches},
          static_cast<int>(s.h),
          static_cast<int>(s.w),
          static_cast<T*>(p.dz),
          static_cast<const T*>(p.x.data),
          p.norm,
          partials + int64_t{blocks} * c_in};
      const cudaError_t error = with_wide_tile(plan.tile, [&](auto t) {
        using Tile = decltype(t);
        return RAN_LAUNCH(plan.launch_shape<Tile>(), stream, dgrad3x3_kernel<Tile, T>, args);
      });
      if (error != cudaSuccess) return error;
      blocks += plan.row_blocks;
    }
  }
  return finish_gradient_sums(p.sum_dz, p.sum_dz_xhat, partials, p.norm, blocks, c_in, stream);
}

}  // namespace
}  // namespace conv3x3

cudaError_t conv3x3_dgrad(const Conv3x3Dgrad& p, DType dtype, cudaStream_t stream) {
  if (!conv3x3_supported(ConvPass::dgrad, p.shape, dtype, nullptr) || p.x.pieces ||
      !aligned16(p.dz, p.dy, p.x.data, p.weight, p.workspace))
    return cudaErrorInvalidValue;
  return dtype == DType::bf16 ? conv3x3::dgrad<bf16>(p, stream) : conv3x3::dgrad<f16>(p, stream);
}

}  // namespace ran::cuda
