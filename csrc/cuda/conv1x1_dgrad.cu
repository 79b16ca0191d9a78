// The gradient of a 1x1 convolution's input, with the ReLU's mask and both sums of batch normalisation's backward pass
// in the epilogue.
#include "conv1x1_product.cuh"
#include "conv_dgrad_end.cuh"

namespace ran::cuda {
namespace conv1x1 {
namespace {

template <typename T>
struct DgradArgs {
  ProductArgs<T> product;
  T* dz;
  const T* x;
  BatchNorm<float> norm;
  GradientSums* partials;  // [gridDim.x][columns]
  float* split_sums;       // of the depth's parts, and a counter a tile
  unsigned* counters;
};

// `pieces`: x, or NoPieces where it is args.x.
template <typename Tile, typename T, typename From>
__device__ __forceinline__ void dgrad_tiles(const DgradArgs<T>& args, const From& pieces) {
  Product<Tile, T, false, true> product(args.product, dynamic_shared<T>());
  product.start();
  const int rows = args.product.a.rows, columns = args.product.columns;
  const int column = product.first_column() + 8 * threadIdx.x;
  const auto table = ColumnTable::fill<Tile::kColumns>(product.table(), args.norm, product.first_column(), columns);
  GradientSums total[8] = {};

  constexpr bool kPieces = std::is_same_v<From, Pieces<T>>;
  Column<T> mine{};
  if constexpr (kPieces) mine = column_of(pieces, column);
  const auto fetch_x = [&](int row) {
    const bool wanted = row < rows && column < columns;
    const T* const x = kPieces ? mine.data + row * mine.pitch : args.x + static_cast<int64_t>(row) * columns + column;
    return wanted ? load_pack<8>(x) : Pack<T, 8>{};
  };
  for (int tile = blockIdx.x; tile < args.product.row_tiles; tile += gridDim.x) {
    typename decltype(product)::Sums sums;
    product.run(sums);
    if (!merge_splits<Tile>(sums, args.split_sums, args.counters, product.flag())) return;
    const ColumnMask mask = table.mask();
    visit_rows<Tile>(product.stage(), sums, tile * Tile::kRows, fetch_x,
                     [&](int row, const Pack<T, 8>& x, float (&dz)[8]) {
                       if (row < rows && column < columns)
                         mask.store(args.dz + static_cast<int64_t>(row) * columns + column, x, dz, total);
                     });
  }
  leave_partials<Tile>(total, args.partials, product.first_column(), columns, product.stage());
}

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2) dgrad_kernel(const DgradArgs<T> args) {
  dgrad_tiles<Tile>(args, NoPieces{});
}

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2) dgrad_pieces_kernel(const DgradArgs<T> args, const Pieces<T> pieces) {
  dgrad_tiles<Tile>(args, pieces);
}

template <typename T>
cudaError_t dgrad(const Conv1x1Dgrad& p, cudaStream_t stream) {
  const Conv1x1Shape& s = p.shape;
  const int rows = static_cast<int>(s.rows()), c_in = static_cast<int>(s.c_in), c_out = static_cast<int>(s.c_out);
  const Plan plan = make_plan(rows, c_out, c_in, dgrad_table_bytes());
  auto* partials = static_cast<GradientSums*>(p.workspace);
  if (rows > 0) {
    const DgradArgs<T> args{product_args<T>({static_cast<const T*>(p.dy), rows, c_out},
                                            {static_cast<const T*>(p.weight), c_out, c_in}, c_in, plan),
                            static_cast<T*>(p.dz),
                            static_cast<const T*>(p.x.data),
                            p.norm,
                            partials,
                            reinterpret_cast<float*>(partials + int64_t(plan.row_blocks) * c_in),
                            p.counters};
    const cudaError_t error = with_tile(plan.tile, [&](auto t) {
      using Tile = decltype(t);
      const LaunchShape shape = plan.launch_shape<Tile>();
      if (s.pieces) return RAN_LAUNCH(shape, stream, dgrad_pieces_kernel<Tile, T>, args, pieces_of<T>(p.x));
      return RAN_LAUNCH(shape, stream, dgrad_kernel<Tile, T>, args);
    });
    if (error != cudaSuccess) return error;
  }
  return finish_gradient_sums(p.sum_dz, p.sum_dz_xhat, partials, p.norm, plan.row_blocks, c_in, stream);
}

}  // namespace
}  // namespace conv1x1

cudaError_t conv1x1_dgrad(const Conv1x1Dgrad& p, DType dtype, cudaStream_t stream) {
  if (!conv1x1_supported(ConvPass::dgrad, p.shape, dtype, nullptr) || !conv1x1::fits(p.x, p.shape, p.norm) ||
      !aligned16(p.dz, p.dy, p.weight, p.workspace))
    return cudaErrorInvalidValue;
  return dtype == DType::bf16 ? conv1x1::dgrad<bf16>(p, stream) : conv1x1::dgrad<f16>(p, stream);
}

}  // namespace ran::cuda
