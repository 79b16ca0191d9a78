// BN-ReLU in one kernel each way, channels_last: a group of blocks reads its slab of channels once, keeps it in shared
// memory, agrees on the sums, and writes the result. Forward moves 2 tensors, backward 3 (4 with a residual gradient).
//
// The group is a cluster, which reads its blocks' sums from their shared memories, or, without clusters, a share of a
// cooperative launch, which passes them through the workspace.
//
// One long file, as both directions share the slab, the exchange and the plan, and nothing else does.
#include "batch_norm.cuh"
#include "mma.cuh"

namespace ran::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Where a block's part of the tensor lies: `rows` rows of `lanes` vectors, the first at `base`.
struct Slab {
  int64_t base, stride, channel;
  int lanes, rows, rank, group;
};

template <int V>
__device__ __forceinline__ Slab slab_of_block(const ChannelView& view, int lanes, int group) {
  const int slab = blockIdx.x / group, rank = blockIdx.x % group;
  const int64_t share = (view.outer + group - 1) / group, start = rank * share, channel = int64_t(slab) * lanes * V;
  const int rows = static_cast<int>(max(min(share, view.outer - start), int64_t(0)));
  return {start * view.channels + channel, view.channels, channel, lanes, rows, rank, group};
}

// Calls body(offset in the tensor, offset in the slab) for the thread's vectors, which are the same on every walk, and
// in one column: what a thread copies, only it reads.
template <int V, typename Body>
__device__ __forceinline__ void for_each_vector(const Slab& slab, Body&& body) {
  const int lane = threadIdx.x % slab.lanes, step = kThreads / slab.lanes;
#pragma unroll 4
  for (int row = threadIdx.x / slab.lanes; row < slab.rows; row += step)
    body(slab.base + row * slab.stride + lane * V, (row * slab.lanes + lane) * V);
}

// Shared memory after the tensors: a flag, coefficients, what the group reads of this block, and scratch. All of it is
// dynamic, so that what a plan counts is what a launch takes.
constexpr int kCoefficients = 3;
constexpr size_t kFlagBytes = 16,
                 kChannelBytes = kCoefficients * sizeof(float) + sizeof(float2) + kWarps * sizeof(GradientSums);

// Where a column's coefficient lies. A lane loads those of its V columns, 16 bytes at a time; of vectors that are 8
// apart the second pair changes places, or lanes 4 apart would meet on the same banks.
__device__ __forceinline__ int coefficient_at(int column) {
  const int vector = column / 4;
  return (vector ^ (vector >> 3 & 1)) * 4 + column % 4;
}

struct Exchange {
  Shared<unsigned> flag;
  Shared<float> coefficients[kCoefficients];
  Shared<float2> published;
  Shared<float> scratch;

  __device__ __forceinline__ Exchange(Shared<unsigned char> p, int channels) : flag(shared_cast<unsigned>(p)) {
    const Shared<float> arrays = shared_cast<float>(p + static_cast<int>(kFlagBytes));
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i) coefficients[i] = arrays + i * channels;
    published = shared_cast<float2>(arrays + kCoefficients * channels);
    scratch = arrays + (kCoefficients + 2) * channels;
  }
  __device__ __forceinline__ void set(int which, int column, float value) const {
    coefficients[which][coefficient_at(column)] = value;
  }
  __device__ __forceinline__ float get(int which, int column) const {
    return coefficients[which][coefficient_at(column)];
  }
  // Of a lane's V columns.
  template <int V>
  __device__ __forceinline__ void get(int which, int lane, float (&v)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      float four[4];
      load<4>(coefficients[which] + coefficient_at(lane * V + i), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = four[j];
    }
  }
};

// Threads that share what a cooperative launch's group has left of a column: neighbours of one warp.
constexpr int kParts = 8;

// The merge of what every block of the group has of column threadIdx.x < columns; read(rank, value) gives a block's
// state. Of a cluster in the order of the ranks; of a cooperative launch, whose groups are large, each of kParts
// threads takes every so many-th rank. The caller places the barrier of a cluster behind it, before which no block may
// go on to end.
template <bool kClusters, typename State, typename Read>
__device__ __forceinline__ State exchange(const Exchange& shared, float2* workspace, const Slab& slab, int columns,
                                          float2 mine, Read&& read) {
  const int column = threadIdx.x, first = blockIdx.x - slab.rank;
  State total{};
  if constexpr (kClusters) {
    if (column < columns) shared.published[column] = mine;
    cluster_sync();
    if (column < columns)
      for (int rank = 0; rank < slab.group; ++rank) {
        const float2 value = cluster_shared(shared.published, rank)[column];
        total = merge(total, read(rank, value));
      }
  } else {
    if (column < columns) workspace[blockIdx.x * columns + column] = mine;
    grid_sync();
    const int of = threadIdx.x / kParts, part = threadIdx.x % kParts;
    if (of < columns)
#pragma unroll 4
      for (int rank = part; rank < slab.group; rank += kParts)
        total = merge(total, read(rank, __ldcg(workspace + (first + rank) * columns + of)));
#pragma unroll
    for (int apart = kParts / 2; apart > 0; apart /= 2) total = merge(total, shuffle_xor(total, apart));
    const auto totals = shared_cast<State>(shared.scratch);
    if (of < columns && part == 0) totals[of] = total;
    __syncthreads();
    if (column < columns) total = totals[column];
  }
  return total;
}

template <bool kClusters>
__device__ __forceinline__ void sync_coefficients() {
  if constexpr (kClusters) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

struct ForwardOutput {
  float *mean, *var;
  RunningStatistics running;
  unsigned* counters;
};

// By the threads of the slab's first block: `m` is the batch's moments of channel threadIdx.x of the slab.
__device__ __forceinline__ void write_statistics(const ForwardOutput& out, const Slab& slab, int columns,
                                                 Moments<float> m, Shared<unsigned> flag) {
  if (static_cast<int>(threadIdx.x) < columns) {
    const int64_t channel = slab.channel + threadIdx.x;
    if (out.running.mean)
      update_running(out.running, running_factor(out.running), channel, m.mean, m.m2 / (m.count - 1.0f));
    out.mean[channel] = m.mean;
    out.var[channel] = m.m2 / m.count;
  }
  // Every slab has read the number of batches before the last one counts this batch.
  if (out.running.batches && last_block(out.counters, gridDim.x / slab.group, flag) && threadIdx.x == 0)
    ++*out.running.batches;
}

template <typename T, bool kClusters>
__global__ void __launch_bounds__(kThreads, 1)
    resident_forward_kernel(T* __restrict__ y, ForwardOutput out, const T* __restrict__ x, const float* weight,
                            const float* bias, ChannelView view, float eps, int lanes, int group, int tile_bytes,
                            float2* workspace) {
  constexpr int V = kVector<T>;
  const Slab slab = slab_of_block<V>(view, lanes, group);
  const int columns = lanes * V, column = threadIdx.x, lane = threadIdx.x % lanes;
  const auto held = dynamic_shared<T>();
  const Exchange shared(dynamic_shared<unsigned char>() + tile_bytes, columns);
  for_each_vector<V>(slab, [&](int64_t at, int kept) { cp_async16(held + kept, x + at); });
  cp_async_commit();
  // As in bn_relu_statistics_cuda.cu, all is relative to the channel's first value.
  float pivot[V];
  load<V>(x + slab.channel + lane * V, pivot);
  if (column == lane)
#pragma unroll
    for (int i = 0; i < V; ++i) shared.set(1, lane * V + i, pivot[i]);
  cp_async_wait<0>();

  // The block's own mean, then the squares of what is left.
  float sum[V] = {}, mean[V], m2[V] = {};
  for_each_vector<V>(slab, [&](int64_t, int kept) {
    float v[V];
    load<V>(held + kept, v);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += v[i] - pivot[i];
  });
  const float count = static_cast<float>(slab.rows);
  const float block_mean = merge_columns<V>(sum, lanes, shared.scratch) / max(count, 1.0f);
  if (column < columns) shared.set(0, column, block_mean);
  __syncthreads();
  shared.get(0, lane, mean);
  for_each_vector<V>(slab, [&](int64_t, int kept) {
    float v[V];
    load<V>(held + kept, v);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float far = v[i] - pivot[i] - mean[i];
      m2[i] = std::fma(far, far, m2[i]);
    }
  });
  const float block_m2 = merge_columns<V>(m2, lanes, shared.scratch);

  const int64_t share = (view.outer + group - 1) / group;
  const auto moments = [&](int rank, float2 part) {
    const float rows = static_cast<float>(max(min(share, view.outer - rank * share), int64_t(0)));
    return Moments<float>{rows, part.x, part.y};
  };
  const float2 own = make_float2(block_mean, block_m2);
  Moments<float> total = exchange<kClusters, Moments<float>>(shared, workspace, slab, columns, own, moments);
  if (column < columns) {
    const int64_t channel = slab.channel + column;
    total.mean += shared.get(1, column);
    const ScaleShift<float> s = scale_shift(total.mean, total.m2 / total.count, weight ? weight[channel] : 1.0f,
                                            bias ? bias[channel] : 0.0f, eps);
    shared.set(0, column, s.scale);
    shared.set(1, column, s.shift);
  }
  sync_coefficients<kClusters>();
  if (slab.rank == 0) write_statistics(out, slab, columns, total, shared.flag);

  float scale[V], shift[V];
  shared.get(0, lane, scale);
  shared.get(1, lane, shift);
  for_each_vector<V>(slab, [&](int64_t at, int kept) {
    float v[V];
    load<V>(held + kept, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = relu(normalise(v[i], ScaleShift<float>{scale[i], shift[i]}));
    store<V>(y + at, v);
  });
}

struct BackwardOutput {
  float *sum_dz, *sum_dz_xhat;
};

template <typename T, bool kClusters>
__global__ void __launch_bounds__(kThreads, 1)
    resident_backward_kernel(T* __restrict__ dx_out, BackwardOutput out, const T* __restrict__ dout,
                             const T* __restrict__ x, const T* __restrict__ residual, ChannelView view,
                             BatchNorm<float> norm, int lanes, int group, int tile_bytes, float2* workspace) {
  constexpr int V = kVector<T>;
  const Slab slab = slab_of_block<V>(view, lanes, group);
  const int columns = lanes * V, column = threadIdx.x, lane = threadIdx.x % lanes;
  const auto held = dynamic_shared<T>(), held_dout = held + tile_bytes / 2 / static_cast<int>(sizeof(T));
  const Exchange shared(dynamic_shared<unsigned char>() + tile_bytes, columns);
  for_each_vector<V>(slab, [&](int64_t at, int kept) {
    cp_async16(held + kept, x + at);
    cp_async16(held_dout + kept, dout + at);
  });
  cp_async_commit();
  const int64_t own = slab.channel + lane * V;
  const ChannelScales<V> scales(norm, own);
  float mean[V];
  load_channels<V>(norm.mean, own, 0.0f, mean);
  cp_async_wait<0>();

  GradientSums sums[V] = {};  // dz_xhat: of dz * (x - mean) until the end
  for_each_vector<V>(slab, [&](int64_t, int kept) {
    float d[V], v[V];
    load<V>(held_dout + kept, d);
    load<V>(held + kept, v);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float dz = relu_backward(d[i], scales.z(i, v[i]));
      sums[i].dz += dz;
      sums[i].dz_xhat = std::fma(dz, v[i] - mean[i], sums[i].dz_xhat);
    }
  });
  const GradientSums block = merge_columns<V>(sums, lanes, shared_cast<GradientSums>(shared.scratch));
  const auto sums_of = [](int, float2 part) { return GradientSums{part.x, part.y}; };
  GradientSums total = exchange<kClusters, GradientSums>(shared, workspace, slab, columns, partial_of(block), sums_of);
  if (column < columns) {
    const int64_t channel = slab.channel + column;
    const float var = norm.var[channel], eps = static_cast<float>(norm.eps);
    total.dz_xhat /= std::sqrt(var + eps);
    const auto k = dx_coefficients(norm.mean[channel], var, norm.weight ? norm.weight[channel] : 1.0f, eps, total.dz,
                                   total.dz_xhat, static_cast<float>(view.outer));
    shared.set(0, column, k.a);
    shared.set(1, column, k.b);
    shared.set(2, column, k.c);
    if (slab.rank == 0) {
      out.sum_dz[channel] = total.dz;
      out.sum_dz_xhat[channel] = total.dz_xhat;
    }
  }
  sync_coefficients<kClusters>();

  float a[V], b[V], c[V];
  shared.get(0, lane, a);
  shared.get(1, lane, b);
  shared.get(2, lane, c);
  for_each_vector<V>(slab, [&](int64_t at, int kept) {
    float d[V], v[V], r[V] = {};
    load<V>(held_dout + kept, d);
    load<V>(held + kept, v);
    if (residual) load<V>(residual + at, r);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const DxCoefficients<float> k{a[i], b[i], c[i], mean[i]};
      const float gradient = dx(relu_backward(d[i], scales.z(i, v[i])), v[i], k);
      v[i] = residual ? gradient + r[i] : gradient;
    }
    store<V>(dx_out + at, v);
  });
}

int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

size_t tile_bytes(const ChannelView& view, const ResidentPlan& plan, int tensors) {
  return blocks_for(view.outer, plan.group) * plan.slab_bytes * tensors;
}

LaunchShape resident_shape(const ChannelView& view, DType dtype, const ResidentPlan& plan, int tensors) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(view.channels * bytes_of(dtype) / plan.slab_bytes * plan.group));
  shape.block = dim3(kThreads);
  shape.shared_bytes = tile_bytes(view, plan, tensors) + plan.slab_bytes / bytes_of(dtype) * kChannelBytes + kFlagBytes;
  shape.cluster = plan.clusters ? plan.group : 1;
  shape.cooperative = !plan.clusters;
  return shape;
}

struct Candidate {
  ResidentPlan plan;
  int64_t busy = 0;  // SMs that have a block
};

// The widest slab (whole sectors, long rows) that still gives nearly every SM a block; else the one with most blocks.
Candidate widest_plan(const ChannelView& view, DType dtype, const Device& device, int tensors, bool clusters) {
  Candidate best;
  const int64_t row_bytes = view.channels * bytes_of(dtype);
  for (const int slab_bytes : {128, 64, 32, 16}) {
    if (row_bytes % slab_bytes || (slab_bytes == 16 && row_bytes % 32 == 0)) continue;
    const int64_t slabs = row_bytes / slab_bytes;
    ResidentPlan plan{1, slab_bytes, clusters};
    if (plan.clusters) {
      while (plan.group * 2 <= device.max_cluster && slabs * plan.group * 2 <= device.sm_count) plan.group *= 2;
    } else {
      plan.group = static_cast<int>(std::max<int64_t>(1, device.sm_count / slabs));
    }
    const auto fits = [&] { return resident_shape(view, dtype, plan, tensors).shared_bytes <= device.shared_bytes; };
    while (plan.clusters && !fits() && plan.group * 2 <= device.max_cluster) plan.group *= 2;
    const int64_t blocks = slabs * plan.group;
    if (!fits() || (!plan.clusters && blocks > device.sm_count)) continue;
    const int64_t busy = std::min<int64_t>(blocks, device.sm_count);
    if (busy * 10 > best.busy * 11) best = {plan, busy};
  }
  return best;
}

}  // namespace

// Of the two barriers that of a cluster is the quicker one; but where channels are few, clusters of 8 leave most SMs
// without a block. On paper, as no shape was timed with both: a cooperative launch where it has more than twice the
// blocks.
ResidentPlan bn_relu_resident_plan(ChannelView view, DType dtype, const Device& device, int tensors) {
  if (dtype == DType::f64 || view.inner != 1 || view.numel() == 0) return {};
  const Candidate grid = widest_plan(view, dtype, device, tensors, false);
  if (device.max_cluster == 1) return grid.plan;
  const Candidate clusters = widest_plan(view, dtype, device, tensors, true);
  return grid.busy > 2 * clusters.busy ? grid.plan : clusters.plan;
}

bool bn_relu_resident_fits(ChannelView view, DType dtype, const Device& device, int tensors) {
  return bn_relu_resident_plan(view, dtype, device, tensors).group > 0;
}

size_t bn_relu_resident_workspace_bytes(ChannelView view, DType dtype, const ResidentPlan& plan) {
  (void)dtype;  // a float2 a channel and block of its group, whatever the tensor holds
  return plan.clusters ? 0 : view.channels * plan.group * sizeof(float2);
}

cudaError_t bn_relu_resident_forward(void* out, float* mean, float* var, const void* x, const float* weight,
                                     const float* bias, DType dtype, ChannelView view, double eps,
                                     RunningStatistics running, const ResidentPlan& plan, void* workspace,
                                     unsigned* counters, cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  if (plan.group == 0 || !aligned16(out, x)) return cudaErrorInvalidValue;
  const LaunchShape shape = resident_shape(view, dtype, plan, 1);
  const ForwardOutput statistics{mean, var, running, counters};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto clusters) {
      return RAN_LAUNCH(shape, stream, resident_forward_kernel<T, decltype(clusters)::value>, static_cast<T*>(out),
                        statistics, static_cast<const T*>(x), weight, bias, view, static_cast<float>(eps),
                        plan.slab_bytes / 16, plan.group, static_cast<int>(tile_bytes(view, plan, 1)),
                        static_cast<float2*>(workspace));
    };
    return plan.clusters ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

cudaError_t bn_relu_resident_backward(void* dx, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x,
                                      const void* residual, DType dtype, ChannelView view, BatchNorm<float> norm,
                                      const ResidentPlan& plan, void* workspace, cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  if (plan.group == 0 || !aligned16(dx, dout, x, residual)) return cudaErrorInvalidValue;
  const LaunchShape shape = resident_shape(view, dtype, plan, 2);
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto clusters) {
      return RAN_LAUNCH(shape, stream, resident_backward_kernel<T, decltype(clusters)::value>, static_cast<T*>(dx),
                        BackwardOutput{sum_dz, sum_dz_xhat}, static_cast<const T*>(dout), static_cast<const T*>(x),
                        static_cast<const T*>(residual), view, norm, plan.slab_bytes / 16, plan.group,
                        static_cast<int>(tile_bytes(view, plan, 2)), static_cast<float2*>(workspace));
    };
    return plan.clusters ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

}  // namespace ran::cuda
