// What the translated kernels call: the small functions here, and those that touch memory or wait, in run_time.h. No
// standard headers: a translation unit of kernels is compiled in a second.
#pragma once

#include <stdint.h>

namespace ptx {

// Threads and blocks.
uint32_t tid(int axis);
uint32_t ntid(int axis);
uint32_t ctaid(int axis);
uint32_t nctaid(int axis);
uint32_t cluster_rank();
uint32_t grid_workspace(int shift);  // half of the address of what a cooperative launch's barrier counts in
[[noreturn]] void trap();

// Memory. `number` names the instruction in its kernel. Shared addresses are offsets in the block's window.
void load_global(void* to, uint64_t address, int bytes, int number);
void load_shared(void* to, uint64_t address, int bytes, int number);
void load_generic(void* to, uint64_t address, int bytes, int number);
void store_global(const void* from, uint64_t address, int bytes, int number);
void store_shared(const void* from, uint64_t address, int bytes, int number);
inline void load_param(void* to, uint64_t address, int bytes) { __builtin_memcpy(to, (const void*)address, bytes); }
uint64_t shared_to_generic(uint64_t offset);
uint64_t generic_to_shared(uint64_t address);
uint64_t in_block_of_rank(uint64_t address, uint32_t rank);
uint32_t load_acquire(uint64_t address, int number);
uint32_t atomic_add(uint64_t address, uint32_t value, int number);
uint32_t atomic_inc(uint64_t address, uint32_t limit, int number);
void copy_async(uint64_t to, uint64_t from, uint32_t bytes, int number);
void copy_commit();
void copy_wait(int groups);

bool mutant(int number);  // whether this one is in force

// Barriers, and what a warp does together.
void barrier(int number);
void warp_barrier(uint32_t mask, int number);
void cluster_arrive(int number);
void cluster_wait(int number);
uint32_t shuffle_xor(uint32_t value, uint32_t lanes, uint32_t clamp, uint32_t mask, int number);
template <bool transposed>
void load_matrix(uint32_t* to, uint64_t address, int number);
void multiply_bf16(float* sums, const uint32_t* a, const uint32_t* b, int number);
void multiply_f16(float* sums, const uint32_t* a, const uint32_t* b, int number);

// Numbers.
uint16_t to_bf16(float x);
uint16_t to_f16(float x);
float from_f16(uint16_t x);
inline float from_bf16(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
float fma_down(float a, float b, float c);  // rounded towards minus infinity
float exp2_flushed(float x);  // as exact as float has it; the hardware is off by 2 units in the last place
inline float relu(float x) { return x > 0 || x != x ? x : 0.0f; }
inline float saturate(float x) { return x > 1 ? 1.0f : x > 0 ? x : 0.0f; }  // NaN becomes 0
inline int32_t truncate(float x) {  // the nearest number that there is; NaN becomes 0
  return x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : x == x ? int32_t(x) : 0;
}
// Exact where the hardware is off by 2 units in the last place; like there, 0 for a divisor beyond 2^126.
inline float divide_roughly(float a, float b) {
  const float size = __builtin_fabsf(b);
  return size > 0x1p126f && !__builtin_isinf(size) ? (__builtin_isinf(a) ? __builtin_nanf("") : 0.0f) : a / b;
}
template <typename T>
T quotient(T a, T b) {
  return b == 0 ? T(-1) : T(a / b);
}
template <typename T>
T remainder(T a, T b) {
  return b == 0 ? a : T(a % b);
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <typename T>
T shift_right(T a, uint32_t n) {  // of the sign, where T has one
  return n >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T(a >> n);
}

}  // namespace ptx
