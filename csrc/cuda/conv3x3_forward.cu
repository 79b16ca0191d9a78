// y = conv3x3(relu(bn(x))) + bias + residual, with the next batch normalisation's statistics in the epilogue.
#include "conv3x3_product.cuh"
#include "conv_forward_end.cuh"

namespace ran::cuda {
namespace conv3x3 {
namespace {

template <typename T>
struct ForwardArgs {
  HaloProductArgs<T> product;
  T* y;
  const T* bias;
  const T* residual;
  BatchNorm<float> norm;
  Moments<float>* partials;  // [gridDim.x][columns]; null: no statistics
  int64_t* batches;          // num_batches_tracked, to be incremented; may be null
};

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2) forward3x3_kernel(const ForwardArgs<T> args) {
  HaloProduct<Tile, T, true, false> product(args.product, dynamic_shared<T>());
  product.start();
  product.fill_table(args.norm);
  if (args.batches && thread_rank() + blockIdx.x + blockIdx.y == 0) ++*args.batches;

  const Patches& patches = args.product.patches;
  const int columns = args.product.columns, column = product.first_column() + 8 * threadIdx.x;
  const auto bias = args.bias && column < columns ? load_pack<8>(args.bias + column) : Pack<T, 8>{};
  const Shared<int> pixels = product.row_pixels();
  ColumnMoments moments;

  const auto fetch_residual = [&](int row) {
    const int pixel = pixels[row];
    const bool wanted = args.residual && pixel >= 0 && column < columns;
    return wanted ? load_pack<8>(args.residual + static_cast<int64_t>(pixel) * columns + column) : Pack<T, 8>{};
  };
  const auto finish = [&](int row, const Pack<T, 8>& residual, float (&v)[8]) {
    const int pixel = pixels[row];
    if (pixel < 0 || column >= columns) return;
    const auto stored = store_sums(args.y + static_cast<int64_t>(pixel) * columns + column, bias, residual, v);
    if (!args.partials) return;
    unpack(stored, v);
    moments.add(v);
  };
  for (int tile = blockIdx.x; tile < args.product.row_tiles; tile += gridDim.x) {
    typename decltype(product)::Sums sums;
    product.run(sums);
    product.place_rows(tile, patches.y.outputs, patches.x.outputs);
    visit_rows<Tile>(product.stage(), sums, 0, fetch_residual, finish);
  }

  if (args.partials) moments.leave<Tile>(args.partials, product.first_column(), columns, product.stage());
}

template <typename T>
cudaError_t forward(const Conv3x3Forward& p, cudaStream_t stream) {
  const Conv3x3Shape& s = p.shape;
  const int c_in = static_cast<int>(s.c_in), c_out = static_cast<int>(s.c_out);
  const Plan plan = forward_plan(s);
  auto* partials = p.statistics.mean ? static_cast<Moments<float>*>(p.workspace) : nullptr;
  const ForwardArgs<T> args{
      {{static_cast<const T*>(p.x.data), c_in}, static_cast<const T*>(p.weight), c_out, plan.row_tiles, plan.patches},
      static_cast<T*>(p.y),
      static_cast<const T*>(p.bias),
      static_cast<const T*>(p.residual),
      p.norm,
      partials,
      partials ? p.statistics.running.batches : nullptr};
  const cudaError_t error = with_wide_tile(plan.tile, [&](auto t) {
    using Tile = decltype(t);
    return RAN_LAUNCH(plan.launch_shape<Tile>(), stream, forward3x3_kernel<Tile, T>, args);
  });
  if (error != cudaSuccess || !partials) return error;
  return finish_statistics(p.statistics, partials, plan.row_blocks, c_out, stream);
}

}  // namespace
}  // namespace conv3x3

cudaError_t conv3x3_forward(const Conv3x3Forward& p, DType dtype, cudaStream_t stream) {
  if (!conv3x3_supported(ConvPass::forward, p.shape, dtype, nullptr) || p.x.pieces ||
      !aligned16(p.y, p.x.data, p.weight, p.bias, p.residual, p.workspace))
    return cudaErrorInvalidValue;
  if (p.shape.rows() == 0) return cudaSuccess;
  return dtype == DType::bf16 ? conv3x3::forward<bf16>(p, stream) : conv3x3::forward<f16>(p, stream);
}

}  // namespace ran::cuda
