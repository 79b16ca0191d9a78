// What instructions.h declares, on the emulation's threads, memories and checks (tests/emulation): a kernel that nvcc
// has made runs under the same schedules, with the same reports of races, unwritten memory and bounds, as its source
// does.
//
// A shared address is an offset in the block's window: static arrays first, dynamic memory behind them. A generic
// address of shared memory has a high bit no pointer has, the block's rank in its gang, and the offset.
#pragma once

#include <cfenv>

#include "../emulation/cuda_emulation.h"
#include "access_log.h"
#include "instructions.h"

namespace ptx {

inline constexpr uint64_t kSharedTag = 1ull << 62;

inline emu::Region& window(uint32_t rank) { return *emu::block_of_rank(rank).dynamic; }
inline emu::Region& own_window() { return *emu::self->block->dynamic; }
inline void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

inline void check_global_access(uint64_t address, int bytes, int number) {
  if (address % bytes) emu::fail("global memory: misaligned", number);
  emu::check_global(pointer(address), bytes, bytes);
}

// One for all grids, as they run one after the other: {size, count}, like what the driver has for each.
inline uint32_t* grid_counts() {
  static emu::Buffer<uint32_t> counts(2);
  static const bool zeroed = [] {
    std::memset(counts.data(), 0, counts.bytes());
    return true;
  }();
  (void)zeroed;
  return counts.data();
}

uint32_t tid(int axis) { return axis == 0 ? emu::self->index.x : axis == 1 ? emu::self->index.y : emu::self->index.z; }
uint32_t ntid(int axis) { return axis == 0 ? blockDim.x : axis == 1 ? blockDim.y : blockDim.z; }
uint32_t ctaid(int axis) {
  const dim3& index = emu::self->block->index;
  return axis == 0 ? index.x : axis == 1 ? index.y : index.z;
}
uint32_t nctaid(int axis) { return axis == 0 ? gridDim.x : axis == 1 ? gridDim.y : gridDim.z; }
uint32_t cluster_rank() { return emu::self->block->rank; }
uint32_t grid_workspace(int shift) {
  return emu::cooperative_launch ? static_cast<uint32_t>(reinterpret_cast<uint64_t>(grid_counts()) >> shift) : 0;
}
void trap() { emu::fail("trap"); }

void load_global(void* to, uint64_t address, int bytes, int number) {
  note(Access::global_load, address, bytes, number);
  check_global_access(address, bytes, number);
  std::memcpy(to, pointer(address), bytes);
}
void store_global(const void* from, uint64_t address, int bytes, int number) {
  note(Access::global_store, address, bytes, number);
  check_global_access(address, bytes, number);
  std::memcpy(pointer(address), from, bytes);
}
void load_shared(void* to, uint64_t offset, int bytes, int number) {
  note(Access::shared_load, offset, bytes, number);
  own_window().read(offset, to, bytes, bytes);
}
void store_shared(const void* from, uint64_t offset, int bytes, int number) {
  note(Access::shared_store, offset, bytes, number);
  own_window().write(offset, from, bytes, bytes);
}
void load_generic(void* to, uint64_t address, int bytes, int number) {
  if (address & kSharedTag) {
    window(address >> 32 & 0xffff).read(address & 0xffffffff, to, bytes, bytes);
  } else {
    load_global(to, address, bytes, number);
  }
}

uint64_t shared_to_generic(uint64_t offset) { return kSharedTag | uint64_t(emu::self->block->rank) << 32 | offset; }
uint64_t generic_to_shared(uint64_t address) {
  if (!(address & kSharedTag) || (address >> 32 & 0xffff) != emu::self->block->rank)
    emu::fail("cvta.to.shared: not an address of the block's shared memory");
  return address & 0xffffffff;
}
uint64_t in_block_of_rank(uint64_t address, uint32_t rank) {
  if (!(address & kSharedTag)) emu::fail("mapa: not an address of shared memory");
  if (rank >= emu::self->block->gang->blocks.size()) emu::fail("mapa: the cluster has no such block");
  return kSharedTag | uint64_t(rank) << 32 | (address & 0xffffffff);
}

// Threads that poll a word wait here until an atomic operation has changed memory.
inline emu::Barrier memory_changed;

inline void change_memory() {
  ++memory_changed.generation;
  ++emu::barriers_passed;
}
uint32_t load_acquire(uint64_t address, int number) {
  check_global_access(address, 4, number);
  const uint32_t value = *static_cast<uint32_t*>(pointer(address));
  if (emu::self->polled == address && emu::self->polled_value == value) {
    memory_changed.what = "ld.acquire";
    emu::self->waits_for = &memory_changed;
    emu::self->generation = memory_changed.generation;
    emu::suspend();
    return *static_cast<uint32_t*>(pointer(address));
  }
  emu::self->polled = address;
  emu::self->polled_value = value;
  return value;
}
uint32_t atomic_add(uint64_t address, uint32_t value, int number) {
  check_global_access(address, 4, number);
  change_memory();
  return atomicAdd(static_cast<uint32_t*>(pointer(address)), value);
}
uint32_t atomic_inc(uint64_t address, uint32_t limit, int number) {
  check_global_access(address, 4, number);
  change_memory();
  return atomicInc(static_cast<uint32_t*>(pointer(address)), limit);
}

void copy_async(uint64_t to, uint64_t from, uint32_t bytes, int number) {
  if (bytes != 0 && bytes != 16) emu::fail("cp.async: bytes of the source", number);
  note(Access::copy_to_shared, to, 16, number);
  if (bytes) note(Access::copy_from_global, from, 16, number);
  ran::cp_async16(ran::Shared<uint32_t>(&own_window(), to), static_cast<uint32_t*>(pointer(from)), bytes == 16);
}
void copy_commit() { ran::cp_async_commit(); }
void copy_wait(int groups) { emu::land(groups); }

bool mutant(int number) { return emu::mutant == number; }

void barrier(int number) { __syncthreads(number); }
void warp_barrier(uint32_t mask, int number) { __syncwarp(mask, number); }
void cluster_arrive(int number) {
  if (emu::self->cluster_arrived) emu::fail("barrier.cluster.arrive twice, with no wait between", number);
  emu::self->cluster_arrived = true;
}
// The arrival is taken at the wait, which in the kernels follows at once.
void cluster_wait(int number) {
  if (!emu::self->cluster_arrived) emu::fail("barrier.cluster.wait without an arrival", number);
  emu::self->cluster_arrived = false;
  emu::gang_sync("barrier.cluster", number);
}
uint32_t shuffle_xor(uint32_t value, uint32_t lanes, uint32_t clamp, uint32_t mask, int number) {
  if (clamp != 31) emu::fail("shfl: only whole warps are known", number);
  return __shfl_xor_sync(mask, value, static_cast<int>(lanes), 32, number);
}
template <bool transposed>
void load_matrix(uint32_t* to, uint64_t address, int number) {
  note(Access::matrix, address, 16, number);
  unsigned r[4];
  ran::ldmatrix_x4<transposed>(r, ran::Shared<uint16_t>(&own_window(), address), number);
  std::memcpy(to, r, sizeof r);
}
template void load_matrix<true>(uint32_t*, uint64_t, int);
template void load_matrix<false>(uint32_t*, uint64_t, int);

template <typename T>
void multiply(float* sums, const uint32_t* a, const uint32_t* b, int number) {
  float d[4];
  unsigned rows[4], columns[2];
  std::memcpy(d, sums, sizeof d);
  std::memcpy(rows, a, sizeof rows);
  std::memcpy(columns, b, sizeof columns);
  ran::mma_m16n8k16<T>(d, rows, columns, number);
  std::memcpy(sums, d, sizeof d);
}
void multiply_bf16(float* sums, const uint32_t* a, const uint32_t* b, int number) {
  multiply<__nv_bfloat16>(sums, a, b, number);
}
void multiply_f16(float* sums, const uint32_t* a, const uint32_t* b, int number) {
  multiply<__half>(sums, a, b, number);
}

uint16_t to_bf16(float x) { return emu::float_to_bf16(x); }
uint16_t to_f16(float x) { return emu::float_to_f16(x); }
float from_f16(uint16_t x) { return emu::f16_to_float(x); }
float fma_down(float a, float b, float c) {
  std::fesetround(FE_DOWNWARD);
  volatile float x = a, y = b, z = c;
  const volatile float result = std::fma(x, y, z);
  std::fesetround(FE_TONEAREST);
  return result;
}
float exp2_flushed(float x) {
  const float y = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace ptx
