// How the 1x1 convolutions are cut into blocks: host side, shared by the three passes.
#pragma once

#include <algorithm>

#include "conv1x1.h"
#include "launch.cuh"

namespace ran::cuda::conv1x1 {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kPanel = 64;  // 16-bit columns of a panel in shared memory; a row of it is 128 bytes, all 32 banks

// What a block computes at a time. Warps split the rows only, so that each element of the first operand, which may have
// to be normalised, passes through one warp.
template <int kBlocks_, int kColumns_, int kStages_>
struct Tile {
  static constexpr int kBlocks = kBlocks_;  // of 16 rows, a warp
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = kStages_;                // chunks of depth kPanel in flight or in use
  static constexpr int kStagePitch = kColumns + 8;        // floats; 8 rows by 4 column pairs then fall on 32 banks
  static constexpr int kStageFloats = 8 * kStagePitch;    // a warp's, on the way from sums to output
  static constexpr int kVectors = kColumns / 8;           // 16-byte vectors of a row
  static constexpr int kRowGroups = kThreads / kVectors;  // threads that share a vector of columns
  static constexpr bool kSplits = kBlocks == 1;           // the depth; of the others, every SM has a tile already
};
using LargeTile = Tile<2, 128, 3>;
using TallTile = Tile<2, 64, 3>;
using SmallTile = Tile<1, 64, 4>;

struct DeviceLimits {
  int capability;        // 90 for 9.0
  int sm_count;          // streaming multiprocessors
  int shared_per_block;  // bytes
  int shared_per_sm;     // bytes
};

#if defined(RAN_EMULATE)
inline DeviceLimits emulated_device{80, 2, 99 << 10, 100 << 10};
inline DeviceLimits device_limits() { return emulated_device; }
#else
// Attributes are looked up by the driver without touching the device, so this is quick and may be done in a capture.
inline DeviceLimits device_limits() {
  const auto attribute = [](cudaDeviceAttr name) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, name, device) != cudaSuccess) return 0;
    return value;
  };
  return {attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}
#endif

enum class TileKind { large, tall, small };

// Calls f with the tile type behind `kind`.
template <typename F>
auto with_tile(TileKind kind, F&& f) {
  switch (kind) {
    case TileKind::large:
      return f(LargeTile{});
    case TileKind::tall:
      return f(TallTile{});
    default:
      return f(SmallTile{});
  }
}

// Chunks of depth that a block sums up at least where the depth is split; fewer, and what the splits leave for each
// other is more traffic than the operands.
inline constexpr int64_t kLeastChunks = 4;

// A product of (rows, depth) by (depth, columns): forward and dgrad.
struct Plan {
  TileKind tile;
  bool resident;  // the weight stays in shared memory, loaded once a block
  int row_tiles, row_blocks, column_tiles;
  int splits, chunks_a_split;  // of the depth; where there are several, a block has one tile of rows
  size_t shared_bytes;

  int tiles() const { return row_tiles * column_tiles; }
  template <typename Tile>
  LaunchShape launch_shape() const {
    return {dim3(row_blocks, column_tiles, splits), dim3(Tile::kVectors, Tile::kRowGroups), shared_bytes};
  }
  // In the workspace: the sums of every split of every tile. And the words that count who has left them.
  size_t split_bytes() const {
    return splits == 1 ? 0 : size_t(tiles()) * splits * SmallTile::kRows * SmallTile::kColumns * sizeof(float);
  }
  size_t counters() const { return splits == 1 ? 0 : tiles(); }
};

// Shared memory of a block that keeps `weight_slots` chunks of the weight.
template <typename Tile>
size_t product_bytes(int64_t weight_slots, size_t table_bytes) {
  const size_t panels = Tile::kStages * Tile::kRows + weight_slots * Tile::kColumns;
  return panels * kPanel * 2 + kWarps * Tile::kStageFloats * sizeof(float) + table_bytes;
}

// The largest tile that fits and gives nearly every SM one; else the small one.
inline TileKind choose_tile(int64_t rows, int64_t depth, int64_t columns, size_t table_bytes,
                            const DeviceLimits& device) {
  const int64_t chunks = blocks_for(depth, kPanel);
  const auto suits = [&](auto t) {
    using Tile = decltype(t);
    const size_t bytes = product_bytes<Tile>(std::min<int64_t>(chunks, Tile::kStages), table_bytes);
    const int64_t tiles = blocks_for(rows, Tile::kRows) * blocks_for(columns, Tile::kColumns);
    return bytes <= static_cast<size_t>(device.shared_per_block) && 8 * tiles >= 7 * int64_t(device.sm_count);
  };
  if (columns > 64 && suits(LargeTile{})) return TileKind::large;
  return suits(TallTile{}) ? TileKind::tall : TileKind::small;
}

// As many blocks as run at once, with even shares of tiles: two an SM where shared memory allows. Registers allow no
// more.
inline int choose_row_blocks(int row_tiles, int column_tiles, size_t shared_bytes, const DeviceLimits& device) {
  const int64_t blocks_per_sm = shared_bytes + 1024 <= size_t(device.shared_per_sm) / 2 ? 2 : 1;
  const int64_t slots = std::max<int64_t>(1, blocks_per_sm * device.sm_count / std::max(1, column_tiles));
  return static_cast<int>(blocks_for(row_tiles, blocks_for(std::max(1, row_tiles), slots)));
}

inline Plan make_plan(int64_t rows, int64_t depth, int64_t columns, size_t table_bytes) {
  const DeviceLimits device = device_limits();
  const TileKind kind = choose_tile(rows, depth, columns, table_bytes, device);
  return with_tile(kind, [&](auto t) -> Plan {
    using Tile = decltype(t);
    const int64_t chunks = blocks_for(depth, kPanel);
    Plan plan;
    plan.tile = kind;
    plan.row_tiles = static_cast<int>(blocks_for(rows, Tile::kRows));
    plan.column_tiles = static_cast<int>(blocks_for(columns, Tile::kColumns));
    // Where there are too few tiles for the SMs, but a long depth, several blocks share a tile.
    const int64_t wanted = device.sm_count / std::max<int64_t>(1, int64_t(plan.row_tiles) * plan.column_tiles);
    const int64_t most = Tile::kSplits ? std::min(wanted, chunks / kLeastChunks) : 1;
    plan.chunks_a_split = static_cast<int>(blocks_for(chunks, std::max<int64_t>(1, most)));
    plan.splits = static_cast<int>(blocks_for(chunks, plan.chunks_a_split));
    plan.resident =
        product_bytes<Tile>(plan.chunks_a_split, table_bytes) <= static_cast<size_t>(device.shared_per_block);
    plan.shared_bytes = product_bytes<Tile>(plan.resident ? plan.chunks_a_split : Tile::kStages, table_bytes);
    plan.row_blocks = choose_row_blocks(plan.row_tiles, plan.column_tiles, plan.shared_bytes, device);
    return plan;
  });
}

// Bytes of a pass's table of channels in shared memory. Room is kept also where nothing is normalised, so that the
// plan, and with it the workspace, depends on the shape alone.
// Of an x in pieces the table also says where each vector of channels lies.
inline size_t forward_table_bytes(int64_t c_in, bool pieces = false) {
  return blocks_for(c_in, kPanel) * (kPanel * 2 * sizeof(float) + (pieces ? kPanel / 8 * 16 : 0));
}
inline size_t dgrad_table_bytes() { return 3 * LargeTile::kColumns * sizeof(float); }

size_t wgrad_workspace(const Conv1x1Shape& shape);  // conv1x1_wgrad.cu

}  // namespace ran::cuda::conv1x1
