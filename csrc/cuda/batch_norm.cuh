// What the batch normalisation kernels share: how a tensor is split over blocks, per-channel coefficients, and the end
// of a reduction.
#pragma once

#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace ran::cuda {

constexpr int kReduceThreads = 256;
// Channels of a block in channels_last: two sectors or more of a row. Its last block reads what all tiles left of them,
// and few channels leave it many threads for that.
constexpr int64_t kGroupChannels = 32;
constexpr int kLoads = 4;  // 16-byte loads in flight a thread and tensor

// A reduction's grid: x over groups of channels, y over tiles of a channel's values. The tiles depend on the shape
// alone, so that the order of a sum, and the workspace, do not depend on where the tensor lies.
struct Tiling {
  int64_t tile, tiles;  // values of a channel in a tile; their number
};

inline Tiling tiling(const ChannelView& view) {
  constexpr int64_t kMaxBlocks = 256, kTileValues = 8192;  // about two blocks an SM: all run at once
  const bool rows = view.inner == 1;
  const int64_t channels = rows ? std::min(view.channels, kGroupChannels) : 1;
  const int64_t groups = blocks_for(view.channels, channels), least = blocks_for(kTileValues, channels);
  const int64_t tiles =
      std::clamp(blocks_for(view.count(), least), int64_t(1), std::max(kMaxBlocks / groups, int64_t(1)));
  const int64_t tile = blocks_for(blocks_for(view.count(), tiles), 8) * 8;  // whole vectors
  return {tile, blocks_for(view.count(), tile)};
}

// channels_last: blockDim.x threads over vectors of channels, the rest over rows. NCHW: a block has one channel.
inline LaunchShape reduce_shape(const ChannelView& view, int vector) {
  unsigned width = 1;
  LaunchShape shape;
  if (view.inner == 1) {
    while (width * vector < std::min(view.channels, kGroupChannels)) width *= 2;
    shape.grid.x = static_cast<unsigned>(blocks_for(view.channels, int64_t(width) * vector));
  } else {
    shape.grid.x = static_cast<unsigned>(view.channels);
  }
  shape.grid.y = static_cast<unsigned>(tiling(view).tiles);
  shape.block = dim3(width, kReduceThreads / width);
  return shape;
}

template <int V>
struct ChannelScales {
  float scale[V], shift[V];

  __device__ __forceinline__ ChannelScales(const BatchNorm<float>& norm, int64_t channel) {
    float mean[V], var[V];
    load_channels<V>(norm.mean, channel, 0.0f, mean);
    load_channels<V>(norm.var, channel, 1.0f, var);
    load_channels<V>(norm.weight, channel, 1.0f, scale);
    load_channels<V>(norm.bias, channel, 0.0f, shift);
#pragma unroll
    for (int i = 0; i < V; ++i) set(i, mean[i], var[i], scale[i], shift[i], static_cast<float>(norm.eps));
  }
  __device__ __forceinline__ void set(int i, float mean, float var, float weight, float bias, float eps) {
    const ScaleShift<float> s = scale_shift(mean, var, weight, bias, eps);
    scale[i] = s.scale;
    shift[i] = s.shift;
  }
  __device__ __forceinline__ float z(int i, float x) const {
    return normalise(x, ScaleShift<float>{scale[i], shift[i]});
  }
};

// One channel's values in NCHW, as a flat array of vectors from vector `first` on.
template <int V>
struct ChannelWalk {
  int64_t plane_stride, base;
  int vectors, first;  // a plane; the first's place in its plane

  __device__ __forceinline__ ChannelWalk(const ChannelView& view, int64_t channel, int64_t start) {
    vectors = static_cast<int>(view.inner / V);
    const auto [plane, place] = divide(start / V, vectors);
    first = place;
    plane_stride = view.channels * view.inner;
    base = plane * plane_stride + channel * view.inner;
  }
  __device__ __forceinline__ int64_t offset(int vector) const {
    const auto [plane, place] = divide(int64_t(first) + vector, vectors);
    return base + plane * plane_stride + int64_t(place) * V;
  }
};

// How a state looks in the workspace.
__device__ __forceinline__ float2 partial_of(Moments<float> m) { return make_float2(m.mean, m.m2); }
__device__ __forceinline__ float2 partial_of(GradientSums s) { return make_float2(s.dz, s.dz_xhat); }
__device__ __forceinline__ float2 partial_of(float sum) { return make_float2(sum, 0.0f); }

// Ends a reduction: merges what the block's threads have of each column, then, in the last block of a channel group,
// all tiles. `first`: of the block's channels. read(partial, tile) gives a tile's state; finish(channel, state) takes a
// result. True in that last block's threads. `scratch`: kReduceThreads states.
template <int V, typename State, typename Read, typename Finish>
__device__ __forceinline__ bool reduce_tiles(State (&state)[V], float2* workspace, unsigned* counters, int64_t first,
                                             int64_t channels, Shared<State> scratch, Shared<unsigned> flag,
                                             Read&& read, Finish&& finish) {
  const int lanes = blockDim.x, columns = V * lanes, tiles = gridDim.y, rank = thread_rank();
  State total = merge_columns<V>(state, lanes, scratch);
  const int64_t channel = first + rank % columns;
  if (tiles > 1) {
    if (rank < columns && channel < channels) workspace[blockIdx.y * channels + channel] = partial_of(total);
    if (!last_block(counters + blockIdx.x, tiles, flag)) return false;
    // Each column has the threads that are `columns` apart.
    State part[1] = {};
    if (channel < channels)
#pragma unroll 4
      for (int tile = rank / columns; tile < tiles; tile += kReduceThreads / columns)
        part[0] = merge(part[0], read(__ldcg(workspace + (tile * channels + channel)), tile));
    total = merge_columns<1>(part, columns, scratch);
  }
  if (rank < columns && channel < channels) finish(channel, total);
  return true;
}

// Weight of the new statistics. With momentum=None, torch's cumulative average.
__device__ __forceinline__ float running_factor(const RunningStatistics& running) {
  return running.momentum >= 0.0f ? running.momentum : 1.0f / static_cast<float>(*running.batches + 1);
}

__device__ __forceinline__ float updated(float running, float factor, float batch) {
  return std::fma(factor, batch, (1.0f - factor) * running);
}

// The statistics of one channel. Both are loaded before either is stored: a load waits as long as all else here takes.
__device__ __forceinline__ void update_running(const RunningStatistics& running, float factor, int64_t channel,
                                               float mean, float unbiased) {
  const float old_mean = running.mean[channel], old_var = running.var[channel];
  running.mean[channel] = updated(old_mean, factor, mean);
  running.var[channel] = updated(old_var, factor, unbiased);
}

}  // namespace ran::cuda
