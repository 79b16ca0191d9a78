// y = conv1x1(relu(bn(x))) + bias + residual, with the attention gate and the next batch normalisation's statistics in
// the epilogue.
#include "conv1x1_product.cuh"
#include "conv_forward_end.cuh"

namespace ran::cuda {
namespace conv1x1 {
namespace {

template <typename T>
struct ForwardArgs {
  ProductArgs<T> product;
  T* y;
  T* gated;
  const T* trunk;
  int gate_h, gate_w, gate_scale;
  const T* bias;
  const T* residual;
  BatchNorm<float> norm;
  Moments<float>* partials;  // [gridDim.x][columns]; null: no statistics
  int64_t* batches;          // num_batches_tracked, to be incremented; may be null
  float* split_sums;         // of the depth's parts, and a counter a tile
  unsigned* counters;
};

// Gates the pixels of the trunk, 1 or 4 for each of the mask's, of the rows that this thread has just written to y.
template <typename Tile, typename T>
__device__ __forceinline__ void gate_rows(const ForwardArgs<T>& args, int first_row, int column,
                                          ColumnMoments& moments) {
  constexpr int kRowsAPass = 32 / Tile::kVectors;
  const Pixels& mask_pixels = args.product.a.pixels;
  const int columns = args.product.columns, scale = args.gate_scale;
  const int row0 = first_row + thread_rank() / 32 * Tile::kWarpRows + thread_rank() % 32 / Tile::kVectors;
  for (int i = 0; i < Tile::kWarpRows / kRowsAPass * scale * scale; ++i) {
    const int row = row0 + i / (scale * scale) * kRowsAPass;
    if (row >= args.product.a.rows || column >= columns) return;
    const int image_row = row / mask_pixels.out_w, image = image_row / mask_pixels.out_h;
    const int y = (image_row - image * mask_pixels.out_h) * scale + i / scale % scale;
    const int x = (row - image_row * mask_pixels.out_w) * scale + i % scale;
    if (y >= args.gate_h || x >= args.gate_w) continue;
    const int64_t at = ((static_cast<int64_t>(image) * args.gate_h + y) * args.gate_w + x) * columns + column;
    float v[8], mask[8];
    load<8>(args.y + static_cast<int64_t>(row) * columns + column, mask);
    load<8>(args.trunk + at, v);
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = gate(v[c], mask[c]);
    const auto rounded = pack_floats<T>(v);
    store_pack<8>(args.gated + at, rounded);
    unpack(rounded, v);
    moments.add(v);
  }
}

// `pieces`: x, or NoPieces where it is args.product.a.
template <typename Tile, typename T, bool kNormalise, typename From>
__device__ __forceinline__ void forward_tiles(const ForwardArgs<T>& args, const From& pieces) {
  constexpr bool kPieces = std::is_same_v<From, Pieces<T>>;
  Product<Tile, T, kNormalise, false, kPieces> product(args.product, dynamic_shared<T>());
  if constexpr (kPieces) product.find_columns(pieces);
  product.start();
  if constexpr (kNormalise) product.fill_table(args.norm);
  if (args.batches && thread_rank() + blockIdx.x + blockIdx.y + blockIdx.z == 0) ++*args.batches;

  const int rows = args.product.a.rows, columns = args.product.columns;
  const int column = product.first_column() + 8 * threadIdx.x;
  const auto bias = args.bias && column < columns ? load_pack<8>(args.bias + column) : Pack<T, 8>{};
  ColumnMoments moments;

  const auto fetch_residual = [&](int row) {
    const bool wanted = args.residual && row < rows && column < columns;
    return wanted ? load_pack<8>(args.residual + static_cast<int64_t>(row) * columns + column) : Pack<T, 8>{};
  };
  const auto finish = [&](int row, const Pack<T, 8>& residual, float (&v)[8]) {
    if (row >= rows || column >= columns) return;
    const auto stored = store_sums(args.y + static_cast<int64_t>(row) * columns + column, bias, residual, v);
    if (!args.partials || args.gated) return;
    unpack(stored, v);
    moments.add(v);
  };
  for (int tile = blockIdx.x; tile < args.product.row_tiles; tile += gridDim.x) {
    typename decltype(product)::Sums sums;
    product.run(sums);
    if (!merge_splits<Tile>(sums, args.split_sums, args.counters, product.flag())) return;
    visit_rows<Tile>(product.stage(), sums, tile * Tile::kRows, fetch_residual, finish);
    if (args.gated) gate_rows<Tile>(args, tile * Tile::kRows, column, moments);
  }

  if (args.partials) moments.leave<Tile>(args.partials, product.first_column(), columns, product.stage());
}

template <typename Tile, typename T, bool kNormalise>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const ForwardArgs<T> args) {
  forward_tiles<Tile, T, kNormalise>(args, NoPieces{});
}

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    forward_pieces_kernel(const ForwardArgs<T> args, const Pieces<T> pieces) {
  forward_tiles<Tile, T, true>(args, pieces);
}

template <typename T>
cudaError_t forward(const Conv1x1Forward& p, cudaStream_t stream) {
  const Conv1x1Shape& s = p.shape;
  const int rows = static_cast<int>(s.rows()), c_in = static_cast<int>(s.c_in), c_out = static_cast<int>(s.c_out);
  const bool normalise = p.norm.mean != nullptr;
  const Plan plan = make_plan(rows, c_in, c_out, forward_table_bytes(c_in, s.pieces));
  auto* moments = static_cast<Moments<float>*>(p.workspace);
  auto* partials = p.statistics.mean ? moments : nullptr;
  const ForwardArgs<T> args{product_args<T>({first_of<T>(p.x), rows, c_in, input_pixels(s)},
                                            {static_cast<const T*>(p.weight), c_out, c_in}, c_out, plan),
                            static_cast<T*>(p.y),
                            static_cast<T*>(p.gate.out),
                            static_cast<const T*>(p.gate.trunk),
                            static_cast<int>(p.gate.h),
                            static_cast<int>(p.gate.w),
                            p.gate.scale,
                            static_cast<const T*>(p.bias),
                            static_cast<const T*>(p.residual),
                            p.norm,
                            partials,
                            partials ? p.statistics.running.batches : nullptr,
                            reinterpret_cast<float*>(moments + int64_t(plan.row_blocks) * c_out),
                            p.counters};
  const cudaError_t error = with_tile(plan.tile, [&](auto t) {
    using Tile = decltype(t);
    const LaunchShape shape = plan.launch_shape<Tile>();
    if (s.pieces) return RAN_LAUNCH(shape, stream, forward_pieces_kernel<Tile, T>, args, pieces_of<T>(p.x));
    return normalise ? RAN_LAUNCH(shape, stream, forward_kernel<Tile, T, true>, args)
                     : RAN_LAUNCH(shape, stream, forward_kernel<Tile, T, false>, args);
  });
  if (error != cudaSuccess || !partials) return error;
  return finish_statistics(p.statistics, partials, plan.row_blocks, c_out, stream);
}

bool gate_fits(const Conv1x1Gate& gate, const Conv1x1Shape& s) {
  if (!gate.out) return true;
  return gate.trunk && (gate.scale == 1 || gate.scale == 2) && blocks_for(gate.h, gate.scale) == s.out_h() &&
         blocks_for(gate.w, gate.scale) == s.out_w();
}

}  // namespace
}  // namespace conv1x1

cudaError_t conv1x1_forward(const Conv1x1Forward& p, DType dtype, cudaStream_t stream) {
  if (!conv1x1_supported(ConvPass::forward, p.shape, dtype, nullptr) || !conv1x1::gate_fits(p.gate, p.shape) ||
      !conv1x1::fits(p.x, p.shape, p.norm) ||
      !aligned16(p.y, p.gate.out, p.gate.trunk, p.weight, p.bias, p.residual, p.workspace))
    return cudaErrorInvalidValue;
  if (p.shape.rows() == 0) return cudaSuccess;
  return dtype == DType::bf16 ? conv1x1::forward<bf16>(p, stream) : conv1x1::forward<f16>(p, stream);
}

}  // namespace ran::cuda
