// How the 3x3 convolutions are cut into blocks: host side. A tile of rows is a patch: a rectangle of outputs of one
// image, or several whole images. The inputs that it reads, its halo, are copied to shared memory once for all taps.
#pragma once

#include <vector>

#include "../common/formulas.h"
#include "conv1x1_plan.h"
#include "conv3x3.h"

namespace ran::cuda::conv3x3 {

using namespace conv1x1;  // tiles, panels and limits are those of the 1x1 convolutions

// One side of an image, vertical or horizontal. Output i reads inputs origin + stride * i on, `taps` of them.
struct Side {
  int outputs, inputs;
  int stride, taps, origin;
  int first_tap = 0, tap_step = 1;  // of the weight: tap t of a read is first_tap + tap_step * t of its 3
  int to = 0, to_step = 1;          // output i is written at to + to_step * i
  int patch = 0, halo = 0;          // outputs of a patch, and the inputs they read

  // With one tap the inputs between are not read and not kept.
  RAN_HD int spacing() const { return taps == 1 ? stride : 1; }  // of inputs in the halo
  RAN_HD int step() const { return taps == 1 ? 1 : stride; }     // of outputs in the halo
  RAN_HD int tiles() const { return (outputs + patch - 1) / patch; }
  int halo_of(int count) const { return (count - 1) * step() + taps; }
  void cut(int count) { patch = count, halo = halo_of(count); }
};

struct Patches {
  Side y, x;
  int images;
  int group = 0;  // images of a patch; 0: none fits

  RAN_HD int taps() const { return y.taps * x.taps; }
  RAN_HD int rows() const { return group * y.patch * x.patch; }
  RAN_HD int halo() const { return group * y.halo * x.halo; }
  int tiles() const { return static_cast<int>(blocks_for(images, group)) * y.tiles() * x.tiles(); }
};

// The patches of at most `rows` outputs and `halo` inputs: as few as can be, of these those with the smallest halo.
inline Patches choose_patches(const Patches& all, int rows, int64_t halo) {
  Patches best = all;
  const auto largest = [](int most, auto fits) {  // of 1 .. most; 0 where none fits
    while (most > 0 && !fits(most)) --most;
    return most;
  };
  const auto least_of_as_many = [](int count, int most) {  // the size of as many parts as sizes of `most` make
    return static_cast<int>(blocks_for(count, blocks_for(count, most)));
  };
  for (int most_wide = std::min(all.x.outputs, rows); most_wide > 0;) {
    Patches now = all;
    const int width = least_of_as_many(all.x.outputs, most_wide);
    most_wide = width - 1;
    now.x.cut(width);
    const int most = std::min(all.y.outputs, rows / width);
    const int height = largest(most, [&](int count) { return int64_t(all.y.halo_of(count)) * now.x.halo <= halo; });
    if (height == 0) continue;
    now.y.cut(least_of_as_many(all.y.outputs, height));
    const bool whole = now.y.tiles() == 1 && now.x.tiles() == 1;
    const int64_t of_halo = halo / (int64_t(now.y.halo) * now.x.halo);
    const int64_t images = std::min<int64_t>({all.images, rows / (now.y.patch * width), of_halo});
    now.group = static_cast<int>(whole ? std::max<int64_t>(1, images) : 1);
    if (best.group == 0 || std::pair(now.tiles(), now.halo()) < std::pair(best.tiles(), best.halo())) best = now;
  }
  return best;
}

// Of the products of forward and dgrad: a halo is multiplied while the next one's copies are in flight.
inline constexpr int kHalos = 2;

struct Plan {
  TileKind tile;
  Patches patches;  // group 0: no tile fits the device
  int row_tiles = 0, row_blocks = 0, column_tiles = 0;
  size_t shared_bytes = 0;

  template <typename Tile>
  LaunchShape launch_shape() const {
    return {dim3(row_blocks, column_tiles), dim3(Tile::kVectors, Tile::kRowGroups), shared_bytes};
  }
};

// Shared memory of a block beside its halos: the weight's chunks, what the epilogue uses, and the table of channels.
template <typename Tile>
size_t product_bytes(size_t table_bytes) {
  return Tile::kStages * Tile::kColumns * kPanel * 2 + kWarps * Tile::kStageFloats * sizeof(float) +
         Tile::kRows * sizeof(int) + table_bytes;
}

// The large tile where it fits and nearly every SM has one, else the tall one.
inline Plan make_plan(const Patches& all, int64_t columns, size_t table_bytes) {
  const DeviceLimits device = device_limits();
  const auto plan_of = [&](TileKind kind, auto t) {
    using Tile = decltype(t);
    Plan plan{kind, all};
    const int64_t left = device.shared_per_block - int64_t(product_bytes<Tile>(table_bytes));
    plan.patches = choose_patches(all, Tile::kRows, left / (kHalos * kPanel * 2));
    plan.column_tiles = static_cast<int>(blocks_for(columns, Tile::kColumns));
    if (plan.patches.group == 0) return plan;
    plan.shared_bytes = product_bytes<Tile>(table_bytes) + kHalos * kPanel * 2 * size_t(plan.patches.halo());
    plan.row_tiles = plan.patches.tiles();
    plan.row_blocks = choose_row_blocks(plan.row_tiles, plan.column_tiles, plan.shared_bytes, device);
    return plan;
  };
  if (columns > TallTile::kColumns) {
    const Plan large = plan_of(TileKind::large, LargeTile{});
    if (8 * int64_t(large.row_tiles) * large.column_tiles >= 7 * int64_t(device.sm_count)) return large;
  }
  return plan_of(TileKind::tall, TallTile{});
}

// Calls f with the tile type behind `kind`, large or tall.
template <typename F>
auto with_wide_tile(TileKind kind, F&& f) {
  return kind == TileKind::large ? f(LargeTile{}) : f(TallTile{});
}

inline Patches forward_patches(const Conv3x3Shape& s) {
  const auto side = [&](int64_t outputs, int64_t inputs) {
    return Side{static_cast<int>(outputs), static_cast<int>(inputs), s.stride, 3, -s.padding};
  };
  return {side(s.out_h(), s.h), side(s.out_w(), s.w), static_cast<int>(s.n)};
}
inline Plan forward_plan(const Conv3x3Shape& s) {
  return make_plan(forward_patches(s), s.c_out, forward_table_bytes(s.c_in));
}

// Inputs 2 i + parity (stride 1: all, parity 0) as outputs of a convolution of dy.
inline Side dgrad_side(int64_t inputs, int64_t outputs, int stride, int padding, int parity) {
  const bool middle = stride == 2 && (parity + padding) % 2 == 1;  // the middle tap alone reaches these
  const int taps = stride == 1 ? 3 : middle ? 1 : 2, first_tap = middle ? 1 : 2;
  return {static_cast<int>((inputs - parity + stride - 1) / stride),
          static_cast<int>(outputs),
          1,
          taps,
          (parity + padding - first_tap) / stride,
          first_tap,
          -stride,
          parity,
          stride};
}
// One for each parity of rows and columns that x has.
inline std::vector<Plan> dgrad_plans(const Conv3x3Shape& s) {
  std::vector<Plan> plans;
  for (int y = 0; y < std::min<int64_t>(s.stride, s.h); ++y)
    for (int x = 0; x < std::min<int64_t>(s.stride, s.w); ++x)
      plans.push_back(make_plan({dgrad_side(s.h, s.out_h(), s.stride, s.padding, y),
                                 dgrad_side(s.w, s.out_w(), s.stride, s.padding, x), static_cast<int>(s.n)},
                                s.c_in, dgrad_table_bytes()));
  return plans;
}

// The weight's gradient: a block has kPanel channels of either side and one row of taps, and sums over some patches of
// at most kPanel pixels.
inline constexpr int kWgradStages = 3;  // patches in flight or in use

struct WgradPlan {
  Patches patches;  // of one row of taps; group 0: none fits the device
  int row_tiles = 0, column_tiles = 0, patches_in_all = 0, splits = 0, patches_a_split = 0;

  // A pixel of zeros; dy's panel and a halo a stage; and where dy's rows read.
  size_t shared_bytes() const {
    return kPanel * 2 + size_t(kWgradStages) * ((kPanel + patches.halo()) * kPanel * 2 + kPanel * sizeof(int));
  }
  LaunchShape launch_shape() const {
    return {dim3(row_tiles, column_tiles, 3 * splits), dim3(kThreads), shared_bytes()};
  }
};

inline WgradPlan wgrad_plan(const Conv3x3Shape& s) {
  const DeviceLimits device = device_limits();
  WgradPlan plan{forward_patches(s)};
  const int64_t beside = WgradPlan{}.shared_bytes();  // without halos
  plan.patches.y.taps = 1;
  plan.patches = choose_patches(plan.patches, kPanel, (device.shared_per_block - beside) / (kWgradStages * kPanel * 2));
  if (plan.patches.group == 0) return plan;
  plan.row_tiles = static_cast<int>(blocks_for(s.c_in, kPanel));
  plan.column_tiles = static_cast<int>(blocks_for(s.c_out, kPanel));
  plan.patches_in_all = plan.patches.tiles();
  const int64_t tiles = int64_t{3} * plan.row_tiles * plan.column_tiles, patches = plan.patches_in_all;
  constexpr int64_t kBlocksPerSm = 2;  // where shared memory allows; registers do
  const int64_t wanted = std::min(blocks_for(kBlocksPerSm * device.sm_count, tiles), blocks_for(patches, kLeastChunks));
  plan.patches_a_split = static_cast<int>(std::max<int64_t>(1, blocks_for(patches, std::max<int64_t>(1, wanted))));
  plan.splits = static_cast<int>(blocks_for(patches, plan.patches_a_split));
  return plan;
}

// What a split leaves: the weight's sums, then c_out sums of dy.
inline int64_t wgrad_floats(const Conv3x3Shape& s) { return s.c_out * (9 * s.c_in + 1); }

}  // namespace ran::cuda::conv3x3
