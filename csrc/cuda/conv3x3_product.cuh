// The main loop of the 3x3 convolutions' forward and dgrad: (outputs, depth) by (depth, columns) for every tap, patch
// after patch.
#pragma once

#include "conv1x1_product.cuh"
#include "conv3x3_tile.cuh"

namespace ran::cuda::conv3x3 {

template <typename T>
struct HaloProductArgs {
  HaloSource<T> source;  // (pixels, depth)
  const T* weight;       // (columns, 3, 3, depth), or (depth, 3, 3, columns) where transposed
  int columns, row_tiles;
  Patches patches;
};

// blockIdx.y is the tile of columns; blockIdx.x and every gridDim.x-th after it are the patches. A chunk is kPanel of
// depth, and a step one tap of a chunk. The weight's panels are requested kStages - 1 steps ahead, halos a chunk ahead.
template <typename Tile, typename T, bool kNormalise, bool kTransposed>
class HaloProduct {
 public:
  using Sums = float[Tile::kBlocks][Tile::kColumns / 8][4];

  __device__ HaloProduct(const HaloProductArgs<T>& args, Shared<T> shared)
      : args_(args),
        walk_(args.patches.group, args.patches.y.halo, args.patches.x.halo),
        chunks_((args.source.channels + kPanel - 1) / kPanel),
        halos_(shared),
        weight_(shared + kHalos * args.patches.halo() * kPanel),
        next_tile_(blockIdx.x) {
    const Patches& p = args.patches;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      const int row = warp_row() + 16 * block + thread_rank() % 16;  // rows past the patch read what lies in row 0
      pixel_[block] = row < p.rows() ? halo_pixel(p, place_in(row, p.y.patch, p.x.patch)) : 0;
    }
    const int tiles = (args.row_tiles - next_tile_ + gridDim.x - 1) / gridDim.x;
    weights_left_ = tiles * chunks_ * p.taps();
  }

  // Behind the operands: what the epilogue uses, the rows' pixels, then the table of scale and shift.
  __device__ Shared<float> stage() const { return shared_cast<float>(weight_ + Tile::kStages * kWeightPanels); }
  __device__ Shared<int> row_pixels() const { return shared_cast<int>(stage() + kWarps * Tile::kStageFloats); }
  __device__ Shared<float> table() const { return shared_cast<float>(row_pixels() + Tile::kRows); }
  __device__ int first_column() const { return blockIdx.y * Tile::kColumns; }

  // Scales, then shifts.
  __device__ void fill_table(const BatchNorm<float>& norm) {
    for (int channel = thread_rank(); channel < chunks_ * kPanel; channel += kThreads) {
      const ScaleShift<float> s = channel_scale_shift(norm, channel, args_.source.channels);
      table()[swapped_at(channel)] = s.scale;
      table()[chunks_ * kPanel + swapped_at(channel)] = s.shift;
    }
    __syncthreads();  // the first chunk is normalised before the first barrier of run()
  }

  __device__ void start() {
    request_halo();
    for (int i = 0; i < Tile::kStages - 1; ++i) request_weight();
  }

  // The sums of the next patch. Between a call's return and the next, shared memory behind the operands is free.
  __device__ void run(Sums& sums) {
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * Tile::kColumns / 2; ++i) (&sums[0][0][0])[i] = 0;
    const Patches& p = args_.patches;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      const Place start = start_;
      for (int y = 0; y < p.y.taps; ++y)
        for (int x = 0; x < p.x.taps; ++x) {
          const bool first = y + x == 0;
          if (p.taps() == 1) {
            cp_async_wait<0>();  // this chunk's halo came with the newest group
          } else {
            cp_async_wait<Tile::kStages - 2>();
          }
          if constexpr (kNormalise)
            if (first) bn_relu(chunk, start);
          __syncthreads();  // this step is there for all, and all are done with the one whose place is taken next
          if (first) request_halo();
          request_weight();
          multiply(sums, chunk, y, x);
          if (++slot_ == Tile::kStages) slot_ = 0;
        }
      halo_slot_ ^= 1;
    }
  }

  // Of the patch that run() has just summed up: leaves the pixel that each row of the warp is written to, -1 for none.
  __device__ void place_rows(int tile, int height, int width) const {
    const Patches& p = args_.patches;
    const Place start = patch_start(p, tile);
    for (int row = warp_row() + thread_rank() % 32; row < warp_row() + Tile::kWarpRows; row += 32) {
      const Place at = place_in(row, p.y.patch, p.x.patch);
      const int image = start.image + at.image, y = start.y + at.y, x = start.x + at.x;
      const bool there = row < p.rows() && image < p.images && y < p.y.outputs && x < p.x.outputs;
      row_pixels()[row] = there ? (image * height + p.y.to + p.y.to_step * y) * width + p.x.to + p.x.to_step * x : -1;
    }
    __syncwarp();
  }

 private:
  static constexpr int kWeightPanels = Tile::kColumns * kPanel;
  static_assert(Tile::kStages == 3);  // two taps or more: halos come with a group that has landed; see run()

  static __device__ int warp_row() { return thread_rank() / 32 * Tile::kWarpRows; }
  __device__ Shared<T> halo(int slot) const { return halos_ + slot * args_.patches.halo() * kPanel; }

  // Becomes part of the group that request_weight() ends.
  __device__ void request_halo() {
    if (next_tile_ >= args_.row_tiles) return;
    if (next_chunk_ == 0) start_ = patch_start(args_.patches, next_tile_);
    args_.source.copy(halo(next_halo_slot_), walk_, args_.patches, start_, next_chunk_ * kPanel);
    next_halo_slot_ ^= 1;
    if (++next_chunk_ == chunks_) next_chunk_ = 0, next_tile_ += gridDim.x;
  }

  __device__ void request_weight() {
    if (weights_left_-- > 0) {
      const Patches& p = args_.patches;
      const int tap = (p.y.first_tap + p.y.tap_step * weight_y_) * 3 + p.x.first_tap + p.x.tap_step * weight_x_;
      request_panels(weight_ + weight_slot_ * kWeightPanels, tap, weight_chunk_ * kPanel);
      if (++weight_x_ == p.x.taps) weight_x_ = 0, ++weight_y_;
      if (weight_y_ == p.y.taps) weight_y_ = 0, ++weight_chunk_;
      if (weight_chunk_ == chunks_) weight_chunk_ = 0;
      if (++weight_slot_ == Tile::kStages) weight_slot_ = 0;
    }
    cp_async_commit();  // also where it is empty: the wait counts groups
  }

  __device__ void request_panels(Shared<T> slot, int tap, int depth) const {
    const int channels = args_.source.channels, row = thread_rank() / 8, vector = thread_rank() % 8;
    const Shared<T> to = slot + panel_at(row, vector);
    if constexpr (kTransposed) {
      const int64_t pitch = int64_t{9} * args_.columns;
#pragma unroll
      for (int panel = 0; panel < Tile::kColumns / kPanel; ++panel) {
        const int column = first_column() + panel * kPanel + 8 * vector;
        const T* source = args_.weight + (depth + row) * pitch + int64_t{tap} * args_.columns + column;
        copy_rows<kPanel>(to + panel * kPanel * kPanel, source, pitch,
                          column < args_.columns ? channels - depth - row : 0, args_.weight);
      }
    } else {
      const int64_t pitch = int64_t{9} * channels;
      const int channel = depth + 8 * vector, column = first_column() + row;
      copy_rows<Tile::kColumns>(to, args_.weight + column * pitch + int64_t{tap} * channels + channel, pitch,
                                channel < channels ? args_.columns - column : 0, args_.weight);
    }
  }

  __device__ void bn_relu(int chunk, const Place& start) const {
    float scale[8], shift[8];
    load_swapped(table() + chunk * kPanel, thread_rank() % 8, scale);
    load_swapped(table() + (chunks_ + chunk) * kPanel, thread_rank() % 8, shift);
    args_.source.bn_relu(halo(halo_slot_), walk_, args_.patches, start, scale, shift);
  }

  __device__ void multiply(Sums& sums, int chunk, int y, int x) const {
    const Patches& p = args_.patches;
    const int left = args_.source.channels - chunk * kPanel, depth = left < kPanel ? left : kPanel;
    const int lane = thread_rank() % 32, key = (lane + tap_key(p, y, x)) & 7;
    const Shared<T> rows = halo(halo_slot_) + (y * p.x.halo + x) * kPanel;
    multiply_chunk<Tile, kTransposed>(sums, weight_ + slot_ * kWeightPanels, depth,
                                      [&](unsigned (&a)[Tile::kBlocks][4], int k) {
                                        const int vector = (k / 8 + lane / 16) ^ key;
#pragma unroll
                                        for (int block = 0; block < Tile::kBlocks; ++block)
                                          ldmatrix_x4<false>(a[block], rows + (pixel_[block] * kPanel + (vector << 3)));
                                      });
  }

  const HaloProductArgs<T>& args_;
  BoxWalk walk_;
  int chunks_;
  Shared<T> halos_, weight_;
  int pixel_[Tile::kBlocks];      // of the halo, that a lane's rows read through the first tap
  int slot_ = 0, halo_slot_ = 0;  // of the step and the chunk to multiply
  Place start_ = {};              // of the halo that was asked for last
  int next_tile_, next_chunk_ = 0, next_halo_slot_ = 0;
  int weights_left_, weight_chunk_ = 0, weight_y_ = 0, weight_x_ = 0, weight_slot_ = 0;
};

}  // namespace ran::cuda::conv3x3
