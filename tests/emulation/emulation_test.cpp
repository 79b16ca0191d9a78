// The emulation itself. Without an argument: instructions against plain C++. With the name of a fault: a kernel that
// has it, which must end the program with a message.
#include "check.h"
#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

using namespace check;
using emu::Buffer;
using ran::Shared;

const ran::LaunchShape one_warp{dim3(1), dim3(32), 2048};
const ran::LaunchShape two_warps{dim3(2), dim3(64), 2048};

template <typename T>
__global__ void product_kernel(float* d, const T* a, const T* b) {
  const auto held = ran::dynamic_shared<T>();  // a, then b, row-major
  for (int i = threadIdx.x; i < 32; i += 32) {
    ran::cp_async16(held + i * 8, a + i * 8);
    ran::cp_async16(held + 256 + i * 8, b + i % 16 * 8, i < 16);
  }
  ran::cp_async_commit();
  ran::cp_async_wait<0>();
  __syncthreads();
  unsigned left[4], right[4];
  const int lane = threadIdx.x;
  ran::ldmatrix_x4<false>(left, held + (lane % 16) * 16 + lane / 16 * 8);
  ran::ldmatrix_x4<true>(right, held + 256 + lane * 8);
  float sums[4] = {1, 1, 1, 1};
  const unsigned first_two[2] = {right[0], right[1]}, zeros[2] = {right[2], right[3]};
  ran::mma_m16n8k16<T>(sums, left, first_two);
  ran::mma_m16n8k16<T>(sums, left, zeros);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <typename T>
void check_product() {
  begin_case("1 + a (16x16) b (16x8) in %s", Type<T>::name);
  Buffer<T> a(256), b(128);
  Buffer<float> d(128);
  fill(a, -8, 8, true);
  fill(b, -8, 8, true);
  run_schedules([&] { return RAN_LAUNCH(one_warp, nullptr, product_kernel<T>, d.data(), a.data(), b.data()); }, d);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = 1;
      for (int k = 0; k < 16; ++k) sum += value(a[row * 16 + k]) * value(b[k * 8 + column]);
      expect_equal("d", d, row * 8 + column, sum);
    }
}

__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(~0u, lane * lane, 5);
  out[32 + lane] = __shfl_xor_sync(~0u, lane, 6);
  out[64 + lane] = __shfl_down_sync(~0u, lane, 3);
  out[96 + lane] = __shfl_up_sync(~0u, lane, 3, 8);
  out[128 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0) >> lane & 1) + 2 * __any_sync(~0u, lane == 9) +
                    4 * __all_sync(~0u, lane < 31);
  out[160 + lane] = static_cast<int>(ran::warp_sum(static_cast<float>(lane)));
}

void check_warp_operations() {
  begin_case("warp operations");
  Buffer<int> out(192);
  run_schedules([&] { return RAN_LAUNCH(one_warp, nullptr, warp_kernel, out.data()); }, out);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT(out[lane] == 25);
    EXPECT(out[32 + lane] == (lane ^ 6));
    EXPECT(out[64 + lane] == (lane + 3 < 32 ? lane + 3 : lane));
    EXPECT(out[96 + lane] == (lane % 8 >= 3 ? lane - 3 : lane));
    EXPECT(out[128 + lane] == (lane % 3 == 0) + 2);
    EXPECT(out[160 + lane] == 496);
  }
}

__global__ void last_block_kernel(int* sums, int* parts, unsigned* counter) {
  RAN_SHARED(unsigned, flag, 1);
  const int t = threadIdx.x, threads = blockDim.x;
  parts[blockIdx.x * threads + t] = static_cast<int>(blockIdx.x) * t;
  if (!ran::last_block(counter, gridDim.x, flag)) return;
  sums[t] = 0;
  for (int other = 0; other < threads; ++other)
    for (unsigned block = 0; block < gridDim.x; ++block) sums[t] += __ldcg(parts + block * threads + other);
}

// The last block sees all that the others' threads wrote; blocks small enough for the schedules to hold one thread, or
// one warp, back.
void check_last_block(int threads) {
  begin_case("last_block, %d threads", threads);
  Buffer<int> sums(threads), parts(4 * threads);
  Buffer<unsigned> counter(1);
  counter[0] = 0;
  for (int repeat = 0; repeat < 20; ++repeat)
    run_schedules(
        [&] {
          poison(parts);
          return RAN_LAUNCH((ran::LaunchShape{dim3(4), dim3(threads)}), nullptr, last_block_kernel, sums.data(),
                            parts.data(), counter.data());
        },
        sums);
  EXPECT(counter[0] == 0);
  for (int t = 0; t < threads; ++t) EXPECT(sums[t] == (1 + 2 + 3) * threads * (threads - 1) / 2);
}

// Every 16-bit number is its own nearest one, and a number between two goes to the nearer.
template <typename T>
void check_numbers() {
  begin_case("numbers of %s", Type<T>::name);
  for (unsigned i = 0; i < 0x7fff; ++i) {
    const double low = value(T{static_cast<uint16_t>(i)}), high = value(T{static_cast<uint16_t>(i + 1)});
    if (high != high || std::isinf(high)) break;
    EXPECT(make<T>(low).raw == i && make<T>(-low).raw == (i | 0x8000));
    EXPECT(low < high);
    EXPECT(make<T>(low + (high - low) * 0.4375).raw == i && make<T>(low + (high - low) * 0.5625).raw == i + 1);
    EXPECT(make<T>((low + high) / 2).raw == i + i % 2);
  }
  EXPECT(std::isinf(value(make<T>(INFINITY))) && std::isinf(value(make<T>(3.4e38))) == (sizeof(T) == 2));
  EXPECT(value(make<T>(NAN)) != value(make<T>(NAN)));
}

__global__ void faulty_kernel(int fault, float* global) {
  RAN_SHARED(float, s, 64);
  const auto d = ran::dynamic_shared<bf16>();
  const int t = threadIdx.x;
  unsigned r[4];
  switch (fault) {
    case 0:  // a read of what another warp writes
      s[t] = 1.0f;
      global[t] = s[63 - t];
      break;
    case 1:  // the barrier comes too late for the second write
      s[t] = 1.0f;
      __syncthreads();
      global[t] = s[63 - t];
      s[t] = 2.0f;
      break;
    case 2:
      if (t < 32) __syncthreads();
      break;
    case 3:
      if (t < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case 4:
      s[t + 1] = 1.0f;
      break;
    case 5:
      ran::shared_cast<float>(d + 1)[0] = 1.0f;
      break;
    case 6:
      global[t] = s[t];
      break;
    case 7:
      for (int i = t; i < 1024; i += 64) d[i] = __float2bfloat16(1.0f);
      __syncthreads();
      ran::ldmatrix_x4<false>(r, d + t % 32 * 8 + 4);
      break;
    case 8:
      ran::cp_async16(d + t * 8, reinterpret_cast<bf16*>(global));
      ran::cp_async_commit();
      ran::cp_async_wait<1>();
      global[t] = __bfloat162float(d[t * 8]);
      break;
    case 9:
      ran::cp_async16(d + t * 8, reinterpret_cast<bf16*>(global));
      ran::cp_async_commit();
      break;
    case 10:
      global[4096 + t] = 1.0f;
      break;
    case 11:
      ran::store_pack<4>(global + 62, ran::Pack<float, 4>{});
      break;
    case 12:
      __shfl_sync(0xffu, t, 0);
      break;
    case 13:
      s[0] = static_cast<float>(t);
      break;
    case 14:
      if (t == 1) __syncwarp();
      if (t != 1) __shfl_sync(~0u, t, 0);
      break;
    case 15:  // the other block may have ended
      s[t] = 1.0f;
      ran::cluster_sync();
      global[t] = ran::cluster_shared(s, 1 - ran::cluster_rank())[t];
      break;
    case 16:  // no barrier between the blocks
      s[t] = 1.0f;
      __syncthreads();
      ran::dynamic_shared<float>()[t] = 1.0f;
      ran::cluster_sync();
      s[t] = 2.0f;
      global[t] = ran::cluster_shared(s, 1 - ran::cluster_rank())[t];
      ran::cluster_sync();
      break;
  }
}

// Of the same signature: a fault is reported by the name of the kernel that has it.
__global__ void faultless_kernel(int, float* global) { global[threadIdx.x] = 1.0f; }

int main(int argc, char** argv) {
  if (argc > 1) {
    const int fault = std::atoi(argv[1]);
    Buffer<float> global(64);
    ran::LaunchShape shape = two_warps;
    if (fault >= 15) shape.cluster = 2;
    emu::schedule = argc > 2 ? emu::Schedule::reverse : emu::Schedule::forward;
    RAN_LAUNCH(shape, nullptr, faultless_kernel, fault, global.data());
    RAN_LAUNCH(shape, nullptr, faulty_kernel, fault, global.data());
    std::puts("the fault went unnoticed");
    return 0;
  }
  check_product<bf16>();
  check_product<f16>();
  check_warp_operations();
  check_last_block(32);
  check_last_block(64);
  check_numbers<bf16>();
  check_numbers<f16>();
  finish("emulation");
}
