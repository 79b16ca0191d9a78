// The main loop of forward and dgrad: (rows, depth) by (depth, columns), tile after tile of rows.
#pragma once

#include "conv1x1_tile.cuh"

namespace ran::cuda::conv1x1 {

template <typename T>
struct ProductArgs {
  Operand<T> a;       // (rows, depth)
  Operand<T> weight;  // (columns, depth), or (depth, columns) where transposed
  int columns, row_tiles;
  bool resident;
  int chunks_a_split;
};

template <typename T>
ProductArgs<T> product_args(const Operand<T>& a, const Operand<T>& weight, int columns, const Plan& plan) {
  return {a, weight, columns, plan.row_tiles, plan.resident, plan.chunks_a_split};
}

// sums += rows * weight over `depth` of a chunk; load(a, k) gives the rows' fragments at depth k.
template <typename Tile, bool kTransposed, typename T, typename Sums, typename Load>
__device__ __forceinline__ void multiply_chunk(Sums& sums, Shared<T> weight, int depth, Load load) {
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    unsigned a[Tile::kBlocks][4];
    load(a, k);
#pragma unroll
    for (int column = 0; column < Tile::kColumns; column += 16) {
      unsigned b[2][2];
      if constexpr (kTransposed) {
        load_columns<true>(b, weight + column / kPanel * kPanel * kPanel, column % kPanel, k);
      } else {
        load_columns<false>(b, weight, column, k);
      }
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) {
        mma_m16n8k16<T>(sums[block][column / 8], a[block], b[0]);
        mma_m16n8k16<T>(sums[block][column / 8 + 1], a[block], b[1]);
      }
    }
  }
}

// blockIdx.y is the tile of columns; blockIdx.x and every gridDim.x-th after it are the tiles of rows; blockIdx.z is
// the part of the depth. A chunk is kPanel of depth. The copies of the next chunks, also those of the next tile, are in
// flight while one is multiplied. Of rows in pieces args.a.data is any of them.
template <typename Tile, typename T, bool kNormalise, bool kTransposed, bool kPieces = false>
class Product {
 public:
  using Sums = float[Tile::kBlocks][Tile::kColumns / 8][4];

  __device__ Product(const ProductArgs<T>& args, Shared<T> shared)
      : args_(args),
        first_chunk_(blockIdx.z * args.chunks_a_split),
        chunks_((args.a.columns + kPanel - 1) / kPanel - first_chunk_),
        rows_(shared),
        weight_(shared + Tile::kStages * kRowsPanel),
        next_tile_(blockIdx.x) {
    if (chunks_ > args.chunks_a_split) chunks_ = args.chunks_a_split;
    stage_ = shared_cast<float>(weight_ + (args.resident ? chunks_ : Tile::kStages) * kWeightPanels);
  }

  // Behind the operands: what the epilogue uses, then the table of scale and shift.
  __device__ Shared<float> stage() const { return stage_; }
  __device__ Shared<float> table() const { return stage_ + kWarps * Tile::kStageFloats; }
  // One word that is free after the last tile.
  __device__ Shared<unsigned> flag() const { return shared_cast<unsigned>(rows_); }
  __device__ int first_column() const { return blockIdx.y * Tile::kColumns; }

  __device__ void fill_table(const BatchNorm<float>& norm) {
    for (int channel = thread_rank(); channel < chunks_ * kPanel; channel += kThreads)
      shared_cast<ScaleShift<float>>(table())[channel] =
          channel_scale_shift(norm, first_chunk_ * kPanel + channel, args_.a.columns);
  }

  // To be called first where the rows are in pieces.
  __device__ void find_columns(const Pieces<T>& pieces) {
    for (int vector = thread_rank(); vector < chunks_ * kPanel / 8; vector += kThreads)
      columns()[vector] = column_of(pieces, first_chunk_ * kPanel + 8 * vector);
    __syncthreads();
  }

  __device__ void start() {
    for (int i = 0; i < Tile::kStages - 1; ++i) request_next();
  }

  // The sums of the next tile of rows. Between a call's return and the next, shared memory behind the operands is free.
  __device__ void run(Sums& sums) {
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * Tile::kColumns / 2; ++i) (&sums[0][0][0])[i] = 0;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      cp_async_wait<Tile::kStages - 2>();
      __syncthreads();  // this chunk is there for all, and all are done with the one whose place is taken next
      request_next();
      multiply(sums, chunk);
      if (++slot_ == Tile::kStages) slot_ = 0;
    }
  }

 private:
  static constexpr int kRowsPanel = Tile::kRows * kPanel, kWeightPanels = Tile::kColumns * kPanel;

  __device__ Shared<T> weight_slot(int chunk, int slot) const {
    return weight_ + (args_.resident ? chunk : slot) * kWeightPanels;
  }

  __device__ void request_next() {
    if (next_tile_ < args_.row_tiles) {
      const int depth = (first_chunk_ + next_chunk_) * kPanel;
      const Shared<T> to = rows_ + next_slot_ * kRowsPanel;
      if constexpr (kPieces) {
        const Column<T> mine = columns()[next_chunk_ * (kPanel / 8) + thread_rank() % 8];
        copy_column<Tile::kRows>(to, mine, args_.a, next_tile_ * Tile::kRows, depth);
      } else {
        copy_panel<Tile::kRows, !kTransposed>(to, args_.a, next_tile_ * Tile::kRows, depth);
      }
      if (!args_.resident || next_tile_ == static_cast<int>(blockIdx.x))
        request_weight(weight_slot(next_chunk_, next_slot_), depth);
      if (++next_chunk_ == chunks_) next_chunk_ = 0, next_tile_ += gridDim.x;
      if (++next_slot_ == Tile::kStages) next_slot_ = 0;
    }
    cp_async_commit();  // also where it is empty: the wait counts groups
  }

  // Behind the table of scale and shift.
  __device__ Shared<Column<T>> columns() const { return shared_cast<Column<T>>(table() + 2 * chunks_ * kPanel); }

  __device__ void request_weight(Shared<T> slot, int depth) {
    if constexpr (kTransposed) {
#pragma unroll
      for (int panel = 0; panel < Tile::kColumns / kPanel; ++panel)
        copy_panel<kPanel, false>(slot + panel * kPanel * kPanel, args_.weight, depth, first_column() + panel * kPanel);
    } else {
      copy_panel<Tile::kColumns, false>(slot, args_.weight, first_column(), depth);
    }
  }

  __device__ void multiply(Sums& sums, int chunk) const {
    const Shared<T> rows = rows_ + slot_ * kRowsPanel, weight = weight_slot(chunk, slot_);
    const int left = args_.a.columns - (first_chunk_ + chunk) * kPanel, depth = left < kPanel ? left : kPanel;
    const int warp_row = thread_rank() / 32 * Tile::kWarpRows;
    multiply_chunk<Tile, kTransposed>(sums, weight, depth, [&](unsigned (&a)[Tile::kBlocks][4], int k) {
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) load_rows<false>(a[block], rows, warp_row + 16 * block, k);
      if constexpr (kNormalise) bn_relu(a, chunk * kPanel + k);
    });
  }

  // A lane holds channels 2 (lane % 4), + 1, + 8 and + 9 of each row.
  __device__ void bn_relu(unsigned (&a)[Tile::kBlocks][4], int first_channel) const {
    const auto table = shared_cast<Pack<ScaleShift<float>, 2>>(table_of(first_channel));
    const Pack<ScaleShift<float>, 2> left = table[thread_rank() % 4], right = table[thread_rank() % 4 + 4];
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      a[block][0] = bn_relu_pair<T>(a[block][0], left.value[0], left.value[1]);
      a[block][1] = bn_relu_pair<T>(a[block][1], left.value[0], left.value[1]);
      a[block][2] = bn_relu_pair<T>(a[block][2], right.value[0], right.value[1]);
      a[block][3] = bn_relu_pair<T>(a[block][3], right.value[0], right.value[1]);
    }
  }
  // Of a channel counted from the first of this block's part of the depth.
  __device__ Shared<float> table_of(int channel) const { return table() + 2 * channel; }

  const ProductArgs<T>& args_;
  int first_chunk_, chunks_;
  Shared<T> rows_, weight_;
  Shared<float> stage_;
  int slot_ = 0;                                    // of the chunk to multiply
  int next_tile_, next_chunk_ = 0, next_slot_ = 0;  // of the copy to ask for
};

// Brings a warp's sums from mma's layout to vectors of 8 columns, 8 rows at a time through its part of the stage, and
// calls apply(row, fetched, sums) for each; fetch(row) gives what is read from global memory, one half block ahead. The
// thread's vector is number threadIdx.x of the tile.
template <typename Tile, typename Sums, typename Fetch, typename Apply>
__device__ __forceinline__ void visit_rows(Shared<float> stage, const Sums& sums, int first_row, Fetch fetch,
                                           Apply apply) {
  constexpr int kRowsAPass = 32 / Tile::kVectors, kPasses = 8 / kRowsAPass;
  const int lane = thread_rank() % 32, warp = thread_rank() / 32;
  const Shared<float> mine = stage + warp * Tile::kStageFloats;
  const int row0 = first_row + warp * Tile::kWarpRows + lane / Tile::kVectors;
  decltype(fetch(0)) fetched[kPasses], next[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) next[pass] = fetch(row0 + pass * kRowsAPass);
#pragma unroll
  for (int half = 0; half < 2 * Tile::kBlocks; ++half) {
    if (half > 0) __syncwarp();  // the rows before have been read
#pragma unroll
    for (int tile = 0; tile < Tile::kColumns / 8; ++tile) {
      const float* pair = sums[half / 2][tile] + half % 2 * 2;
      const int column = tile * 8 + ((lane % 4 * 2) ^ swapped_at(tile * 8) % 8);  // so that it is one store
      shared_cast<float2>(mine + (lane / 4 * Tile::kStagePitch + column))[0] = make_float2(pair[0], pair[1]);
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      fetched[pass] = next[pass];
      if (half + 1 < 2 * Tile::kBlocks) next[pass] = fetch(row0 + 8 * (half + 1) + pass * kRowsAPass);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      float v[8];
      load_swapped(mine + (pass * kRowsAPass + lane / Tile::kVectors) * Tile::kStagePitch, threadIdx.x, v);
      apply(row0 + 8 * half + pass * kRowsAPass, fetched[pass], v);
    }
  }
}

}  // namespace ran::cuda::conv1x1
