// Values as the kernels see them: read and written 16 bytes at a time where the host says so, computed on as floats.
#pragma once

#include <cstring>

#include "launch.cuh"

namespace ran {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half(x);
  } else {
    return x;
  }
}

// How many T make 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / sizeof(T);

// V values moved by one instruction; the address must be a multiple of the size.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
#if defined(RAN_EMULATE)
  emu::check_global(p, sizeof(Pack<T, V>), sizeof(Pack<T, V>));
#endif
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

// To global memory. A plain copy of 16 bytes may be taken apart again by the compiler, a hinted store never is.
template <int V, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
#if defined(RAN_EMULATE)
  emu::check_global(p, sizeof pack, sizeof pack);
#else
  if constexpr (sizeof pack == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    __stcg(reinterpret_cast<uint4*>(p), bits);
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

#if defined(RAN_EMULATE)
template <int V, typename T>
Pack<T, V> load_pack(Shared<T> p) {
  return shared_cast<Pack<T, V>>(p)[0];
}
template <int V, typename T>
void store_pack(Shared<T> p, const Pack<T, V>& pack) {
  shared_cast<Pack<T, V>>(p)[0] = pack;
}
#endif

template <int V, typename T>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = to_float(pack.value[i]);
}

// Rounds to nearest even, two at a time where the hardware can.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> pack_floats(const float (&v)[V]) {
  Pack<T, V> pack;
#if !defined(RAN_EMULATE)
  if constexpr (std::is_same_v<T, bf16> && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2)
      reinterpret_cast<__nv_bfloat162&>(pack.value[i]) = __floats2bfloat162_rn(v[i], v[i + 1]);
  } else if constexpr (std::is_same_v<T, f16> && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) reinterpret_cast<__half2&>(pack.value[i]) = __floats2half2_rn(v[i], v[i + 1]);
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < V; ++i) pack.value[i] = from_float<T>(v[i]);
  }
  return pack;
}

// Pointer: T* to global memory, or Shared<T>.
template <int V, typename Pointer>
__device__ __forceinline__ void load(Pointer p, float (&v)[V]) {
  unpack(load_pack<V>(p), v);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* p, const float (&v)[V]) {
  store_pack<V>(p, pack_floats<T>(v));
}
#if defined(RAN_EMULATE)
template <int V, typename T>
void store(Shared<T> p, const float (&v)[V]) {
  store_pack<V>(p, pack_floats<T>(v));
}
#endif

// A per-channel vector's values from `channel` on, a multiple of V. It need not lie on 16 bytes; null stands for
// `missing`.
template <int V>
__device__ __forceinline__ void load_channels(const float* p, int64_t channel, float missing, float (&v)[V]) {
  if constexpr (V % 4 == 0) {
    if (p && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < V; i += 4) {
        const Pack<float, 4> four = load_pack<4>(p + channel + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] = four.value[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = p ? p[channel + i] : missing;
}

// Host side: whether all pointers lie on 16 bytes (null does).
template <typename... Pointers>
bool aligned16(Pointers... p) {
  return ((reinterpret_cast<uintptr_t>(p) | ...) & 15) == 0;
}

// Calls f(T{}) for the type behind dtype.
template <typename F>
cudaError_t with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls f with the vector width as a constant: 16 bytes, or one value where the host found that it does not fit.
template <typename T, typename F>
cudaError_t with_vector(bool fits, F&& f) {
  return fits ? f(std::integral_constant<int, kVector<T>>{}) : f(std::integral_constant<int, 1>{});
}

}  // namespace ran
