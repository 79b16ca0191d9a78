// The gradient of a 1x1 convolution's weight and bias, with relu(bn(x)) computed again from x. The pixels are the depth
// of the product and are split between blocks; their sums are merged in a fixed order by a second kernel.
#include "conv_wgrad_end.cuh"

namespace ran::cuda {
namespace conv1x1 {
namespace {

// Rows of the product are input channels (the operand that is normalised, by row here, so scale and shift stay in
// registers), columns are output channels.
template <int kBlocks_, int kColumns_>
struct WgradTile {
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = 3;
  static constexpr int kStageValues = (kRows + kColumns) * kPanel;
  static constexpr size_t kSharedBytes = kStages * kStageValues * sizeof(bf16);
};
using LargeWgradTile = WgradTile<2, 128>;
using SmallWgradTile = WgradTile<1, 64>;

struct WgradPlan {
  bool large;
  int row_tiles, column_tiles, splits;
  int chunks_a_split;  // of kPanel pixels
};

WgradPlan make_wgrad_plan(const Conv1x1Shape& s) {
  const int64_t chunks = blocks_for(s.rows(), kPanel), sm_count = device_limits().sm_count;
  const auto tiles = [&](int side) { return blocks_for(s.c_in, side) * blocks_for(s.c_out, side); };
  const bool large = s.c_in > 64 && s.c_out > 64 && tiles(128) * (chunks / kLeastChunks) >= sm_count;
  const int64_t side = large ? 128 : 64;
  constexpr int64_t kBlocksPerSm = 2;  // both fit, by shared memory and by registers
  const int64_t wanted = std::min(blocks_for(kBlocksPerSm * sm_count, tiles(side)), blocks_for(chunks, kLeastChunks));
  const int64_t chunks_a_split = std::max<int64_t>(1, blocks_for(chunks, std::max<int64_t>(1, wanted)));
  return {large, static_cast<int>(blocks_for(s.c_in, side)), static_cast<int>(blocks_for(s.c_out, side)),
          static_cast<int>(blocks_for(chunks, chunks_a_split)), static_cast<int>(chunks_a_split)};
}

// What a split leaves: c_out * c_in sums, then c_out sums of dy.
int64_t split_floats(const Conv1x1Shape& s) { return s.c_out * (s.c_in + 1); }

template <typename T>
struct WgradArgs {
  Operand<T> x, dy;  // (pixels, c_in), (pixels, c_out)
  BatchNorm<float> norm;
  float* partials;  // [gridDim.z][c_out * c_in + c_out]
  int chunks_a_split;
};

// Chunks of pixels, copied ahead into kStages places. `pieces`: x, or NoPieces where it is args.x.
template <typename Tile, typename T, typename From>
class Chunks {
 public:
  __device__ Chunks(const WgradArgs<T>& args, const From& pieces, Shared<T> shared)
      : args_(args), shared_(shared), chunk_(blockIdx.z * args.chunks_a_split) {
    if constexpr (kPieces) {
#pragma unroll
      for (int i = 0; i < Tile::kRows / kPanel; ++i)
        columns_[i] = column_of(pieces, blockIdx.x * Tile::kRows + i * kPanel + 8 * (thread_rank() % 8));
    }
    const int all = (args.x.rows + kPanel - 1) / kPanel;
    end_ = chunk_ + args.chunks_a_split < all ? chunk_ + args.chunks_a_split : all;
    count_ = end_ - chunk_;
    for (int i = 0; i < Tile::kStages - 1; ++i) request_next();
  }
  __device__ int count() const { return count_; }

  // The panels of the next chunk: x's, then dy's.
  __device__ Shared<T> next() {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this chunk is there for all, and all are done with the one whose place is taken next
    request_next();
    const Shared<T> here = shared_ + slot_ * Tile::kStageValues;
    if (++slot_ == Tile::kStages) slot_ = 0;
    return here;
  }

 private:
  static constexpr bool kPieces = std::is_same_v<From, Pieces<T>>;

  __device__ void request_next() {
    if (chunk_ < end_) {
      const Shared<T> x = shared_ + next_slot_ * Tile::kStageValues, dy = x + Tile::kRows * kPanel;
#pragma unroll
      for (int i = 0; i < Tile::kRows / kPanel; ++i) {
        const Shared<T> to = x + i * kPanel * kPanel;
        const int column = blockIdx.x * Tile::kRows + i * kPanel;
        if constexpr (kPieces)
          copy_column<kPanel>(to, columns_[i], args_.x, chunk_ * kPanel, column);
        else
          copy_panel<kPanel, true>(to, args_.x, chunk_ * kPanel, column);
      }
#pragma unroll
      for (int i = 0; i < Tile::kColumns / kPanel; ++i)
        copy_panel<kPanel, false>(dy + i * kPanel * kPanel, args_.dy, chunk_ * kPanel,
                                  blockIdx.y * Tile::kColumns + i * kPanel);
      ++chunk_;
      if (++next_slot_ == Tile::kStages) next_slot_ = 0;
    }
    cp_async_commit();  // also where it is empty: the wait counts groups
  }

  const WgradArgs<T>& args_;
  Shared<T> shared_;
  int chunk_, end_, count_, slot_ = 0, next_slot_ = 0;
  Column<T> columns_[kPieces ? Tile::kRows / kPanel : 1];  // of pieces: where this thread's columns of x lie
};

template <typename Tile, typename T, typename From>
__device__ __forceinline__ void wgrad_split(const WgradArgs<T>& args, const From& pieces) {
  const int lane = thread_rank() % 32, warp = thread_rank() / 32;
  const int c_in = args.x.columns, c_out = args.dy.columns, warp_row = warp * Tile::kWarpRows;
  const int row0 = blockIdx.x * Tile::kRows + warp_row + lane / 4, column0 = blockIdx.y * Tile::kColumns + lane % 4 * 2;
  Chunks<Tile, T, From> chunks(args, pieces, dynamic_shared<T>());
  ScaleShift<float> s[Tile::kBlocks][2];
#pragma unroll
  for (int i = 0; i < 2 * Tile::kBlocks; ++i) s[i / 2][i % 2] = channel_scale_shift(args.norm, row0 + 8 * i, c_in);
  // Each warp sums dy over every fourth pair of column tiles it meets; a lane has 4 of 16 pixels of a column.
  constexpr int kPairs = Tile::kColumns / 16;
  float sums[Tile::kBlocks][2 * kPairs][4] = {}, dy_sums[kPairs / kWarps][2] = {};
  for (int chunk = 0; chunk < chunks.count(); ++chunk) {
    const Shared<T> x = chunks.next(), dy = x + Tile::kRows * kPanel;
#pragma unroll 1
    for (int k = 0; k < kPanel; k += 16) {
      unsigned a[Tile::kBlocks][4];
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) {
        const int row = warp_row + 16 * block;
        load_rows<true>(a[block], x + row / kPanel * kPanel * kPanel, row % kPanel, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[block][i] = bn_relu_pair<T>(a[block][i], s[block][i % 2], s[block][i % 2]);
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        unsigned b[2][2];
        load_columns<true>(b, dy + pair * 16 / kPanel * kPanel * kPanel, pair * 16 % kPanel, k);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
#pragma unroll
          for (int block = 0; block < Tile::kBlocks; ++block)
            mma_m16n8k16<T>(sums[block][2 * pair + side], a[block], b[side]);
          if (pair % kWarps == warp) dy_sums[pair / kWarps][side] += sum_of_pairs<T>(b[side]);
        }
      }
    }
  }

  float* partials = args.partials + static_cast<int64_t>(blockIdx.z) * c_out * (c_in + 1);
#pragma unroll
  for (int i = 0; i < Tile::kBlocks * 2 * kPairs * 4; ++i) {
    const int block = i / (8 * kPairs), tile = i / 4 % (2 * kPairs), part = i % 4;
    const int row = row0 + 16 * block + 8 * (part / 2), column = column0 + 8 * tile + part % 2;
    if (row < c_in && column < c_out) partials[static_cast<int64_t>(column) * c_in + row] = sums[block][tile][part];
  }
  if (blockIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kPairs / kWarps * 2; ++i) {
    float sum = dy_sums[i / 2][i % 2];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int column = blockIdx.y * Tile::kColumns + (i / 2 * kWarps + warp) * 16 + i % 2 * 8 + lane / 4;
    if (lane % 4 == 0 && column < c_out) partials[static_cast<int64_t>(c_out) * c_in + column] = sum;
  }
}

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2) wgrad_kernel(const WgradArgs<T> args) {
  wgrad_split<Tile>(args, NoPieces{});
}

template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads, 2) wgrad_pieces_kernel(const WgradArgs<T> args, const Pieces<T> pieces) {
  wgrad_split<Tile>(args, pieces);
}

template <typename T>
cudaError_t wgrad(const Conv1x1Wgrad& p, cudaStream_t stream) {
  const Conv1x1Shape& s = p.shape;
  const int rows = static_cast<int>(s.rows()), c_in = static_cast<int>(s.c_in), c_out = static_cast<int>(s.c_out);
  const WgradPlan plan = make_wgrad_plan(s);
  auto* partials = static_cast<float*>(p.workspace);
  if (rows > 0) {
    const WgradArgs<T> args{{first_of<T>(p.x), rows, c_in, input_pixels(s)},
                            {static_cast<const T*>(p.dy), rows, c_out},
                            p.norm,
                            partials,
                            plan.chunks_a_split};
    const auto run = [&](auto t) {
      using Tile = decltype(t);
      const LaunchShape shape{dim3(plan.row_tiles, plan.column_tiles, plan.splits), dim3(kThreads), Tile::kSharedBytes};
      if (s.pieces) return RAN_LAUNCH(shape, stream, wgrad_pieces_kernel<Tile, T>, args, pieces_of<T>(p.x));
      return RAN_LAUNCH(shape, stream, wgrad_kernel<Tile, T>, args);
    };
    const cudaError_t error = plan.large ? run(LargeWgradTile{}) : run(SmallWgradTile{});
    if (error != cudaSuccess) return error;
  }
  return finish_wgrad(static_cast<T*>(p.dweight), static_cast<T*>(p.dbias), partials, plan.splits, s.c_out * s.c_in,
                      split_floats(s), stream);
}

}  // namespace

size_t wgrad_workspace(const Conv1x1Shape& s) { return make_wgrad_plan(s).splits * split_floats(s) * sizeof(float); }

}  // namespace conv1x1

cudaError_t conv1x1_wgrad(const Conv1x1Wgrad& p, DType dtype, cudaStream_t stream) {
  if (!conv1x1_supported(ConvPass::wgrad, p.shape, dtype, nullptr) || !conv1x1::fits(p.x, p.shape, p.norm) ||
      !aligned16(p.dweight, p.dbias, p.dy, p.workspace))
    return cudaErrorInvalidValue;
  return dtype == DType::bf16 ? conv1x1::wgrad<bf16>(p, stream) : conv1x1::wgrad<f16>(p, stream);
}

}  // namespace ran::cuda
