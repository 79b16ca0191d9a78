// Lets the CUDA kernel sources compile with g++ and run on the CPU: compile with -DRAN_EMULATE -fno-strict-aliasing,
// and include the .cu file. Threads are fibers (scheduler.h), shared memory is checked access by access
// (shared_memory.h), global buffers are guarded (global_memory.h), PTX instructions have twins (mma_emulation.h).
//
// Not emulated: the memory model (fences do nothing; one thread runs at a time), partial warps, and speed.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "global_memory.h"
#include "number_types.h"
#include "scheduler.h"
#include "shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using std::max;
using std::min;
template <typename T>
T __ldcg(const T* p) {
  emu::check_global(p, sizeof(T), alignof(T));
  return *p;
}

// Barriers. Every thread of the group must come, and to the same call.
inline void __syncthreads(int line = __builtin_LINE()) {
  emu::Block& block = *emu::self->block;
  emu::meet(block.barrier, static_cast<int>(block.threads.size()), "__syncthreads", line);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  if (mask != ~0u) emu::fail("__syncwarp: only the full mask is emulated", line);
  emu::meet(emu::self->block->warps[emu::self->warp].sync, 32, "__syncwarp", line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emu {

// Every lane gives a value and sees those of all 32.
template <typename T>
const T* gather(const T& value, const char* what, int line, unsigned mask = ~0u) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) * 32 <= sizeof(Warp::slots[0]));
  if (mask != ~0u) fail("a warp operation with a partial mask is not emulated", line);
  Warp& warp = self->block->warps[self->warp];
  T* slots = reinterpret_cast<T*>(warp.slots[warp.collective.generation & 1]);
  slots[self->lane] = value;
  meet(warp.collective, 32, what, line);
  return slots;
}

inline int lane_in(int lane, int width) { return (self->lane & ~(width - 1)) + (lane & (width - 1)); }

}  // namespace emu

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  return emu::gather(value, "__shfl_sync", line, mask)[emu::lane_in(lane, width)];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int lane = emu::self->lane ^ lanes;
  const T* all = emu::gather(value, "__shfl_xor_sync", line, mask);
  return lane / width == emu::self->lane / width ? all[lane] : value;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = emu::self->lane + delta;
  const T* all = emu::gather(value, "__shfl_down_sync", line, mask);
  return lane / width == emu::self->lane / width ? all[lane] : value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = emu::self->lane - static_cast<int>(delta);
  const T* all = emu::gather(value, "__shfl_up_sync", line, mask);
  return lane >= 0 && lane / width == emu::self->lane / width ? all[lane] : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const int* all = emu::gather(predicate, "__ballot_sync", line, mask);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(all[lane] != 0) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == ~0u;
}

// Integer atomics on global memory. One thread runs at a time, so plain code is atomic.
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  emu::check_global(p, sizeof *p, alignof(unsigned));
  return std::exchange(*p, *p + value);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  emu::check_global(p, sizeof *p, alignof(unsigned));
  return std::exchange(*p, *p >= limit ? 0 : *p + 1);
}
inline unsigned atomicExch(unsigned* p, unsigned value) {
  emu::check_global(p, sizeof *p, alignof(unsigned));
  return std::exchange(*p, value);
}
inline unsigned atomicMax(unsigned* p, unsigned value) {
  emu::check_global(p, sizeof *p, alignof(unsigned));
  return std::exchange(*p, *p > value ? *p : value);
}

namespace emu {

inline Block::~Block() = default;

inline constexpr size_t kMaxShared = 227 << 10;

inline std::unique_ptr<Block> make_block(Gang& gang, dim3 index, dim3 block_size, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->gang = &gang;
  block->index = index;
  block->rank = static_cast<unsigned>(gang.blocks.size());
  const unsigned count = block_size.x * block_size.y * block_size.z;
  block->threads.resize(count);
  block->warps.resize(count / 32);
  block->live = static_cast<int>(count);
  block->dynamic = std::make_unique<Region>(block.get(), -1, shared_bytes);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = block->threads[i];
    t.block = block.get();
    t.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y));
    t.flat = static_cast<int>(i);
    t.warp = t.flat / 32;
    t.lane = t.flat % 32;
  }
  return block;
}

// A kernel to run: its source, and the bytes of each parameter.
struct Kernel {
  const void* address;
  std::function<void()> source;
  std::vector<const unsigned char*> parameters;
};

// What nvcc has made of a kernel, in a program that holds it (tests/ptx): it runs in the place of the source.
struct Compiled {
  void (*entry)(const unsigned char* const* parameters);
  size_t static_bytes;  // of shared memory; the dynamic bytes lie behind them
  const char* name;     // as in budgets.json
};
inline std::map<const void*, Compiled> compiled;  // by the kernel's address
inline bool run_sources = false;                  // all the same
inline bool skip_kernels = false;                 // launches do nothing
inline bool known = true;                         // whatever was launched since had run under every schedule

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  bool cooperative;
};

inline std::unique_ptr<Gang> make_gang(const Shape& shape, size_t first, size_t count) {
  auto gang = std::make_unique<Gang>();
  for (size_t b = first; b < first + count; ++b) {
    const dim3 index(b % shape.grid.x, b / shape.grid.x % shape.grid.y, b / (size_t(shape.grid.x) * shape.grid.y));
    gang->blocks.push_back(make_block(*gang, index, shape.block, shape.shared_bytes));
  }
  return gang;
}

// Runs a kernel in every thread of the grid; gangs from the last to the first under the reverse schedule.
inline void run(Launched& launched, Shape shape, const Kernel& ours) {
  if (skip_kernels) return;
  const size_t blocks = size_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  kernel = launched.name.c_str();
  if (blocks == 0 || threads == 0 || threads > 1024 || threads % 32) fail("launch: blocks must be 1 to 32 full warps");
  if (shape.cluster == 0 || shape.cluster > 16 || shape.grid.x % shape.cluster)
    fail("launch: the cluster must divide the grid and be at most 16");
  body = ours.source;
  if (!compiled.empty() && !run_sources) {
    const auto found = compiled.find(ours.address);
    if (found == compiled.end()) fail("launch: the program does not hold what nvcc has made of this kernel");
    kernel = found->second.name;
    shape.shared_bytes += found->second.static_bytes;
    body = [entry = found->second.entry, &ours] { entry(ours.parameters.data()); };
  }
  if (shape.shared_bytes > kMaxShared) fail("launch: more shared memory than an SM has");
  known = known && launched.schedules == kAllSchedules;
  launched.schedules |= 1u << static_cast<int>(schedule);
  gridDim = shape.grid;
  blockDim = shape.block;
  cluster_size = shape.cluster;
  cooperative_launch = shape.cooperative;
  const size_t gang_size = shape.cooperative ? blocks : shape.cluster, gangs = blocks / gang_size;
  const size_t at_a_time = gangs_at_a_time();
  for (size_t g = 0; g < gangs; g += at_a_time) {
    std::vector<std::unique_ptr<Gang>> alive;
    for (size_t i = g; i < std::min(g + at_a_time, gangs); ++i)
      alive.push_back(make_gang(shape, (schedule == Schedule::reverse ? gangs - 1 - i : i) * gang_size, gang_size));
    run_gangs(alive);
  }
  kernel = nullptr;
}

inline Block& block_of_rank(unsigned rank) { return *self->block->gang->blocks.at(rank); }

inline void gang_sync(const char* what, int line) {
  Gang& gang = *self->block->gang;
  meet(gang.barrier, static_cast<int>(gang.blocks.size() * self->block->threads.size()), what, line);
}

}  // namespace emu

#include "mma_emulation.h"
