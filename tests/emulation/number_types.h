// bfloat16, half and CUDA's vector types for g++, so that the emulation needs no CUDA headers. Rounding is to nearest
// even, as in cvt.rn. Only what the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t u = bits<uint32_t>(value);
  if (value != value) return 0x7fff;  // what cvt.rn.bf16.f32 gives for every NaN
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float bf16_to_float(uint16_t value) { return bits<float>(static_cast<uint32_t>(value) << 16); }

inline float f16_to_float(uint16_t value) {
  const uint32_t sign = (value & 0x8000u) << 16, exponent = (value >> 10) & 31, fraction = value & 1023;
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(float(fraction) * 0x1p-24f));
  return bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_f16(float value) {
  const uint16_t sign = static_cast<uint16_t>((bits<uint32_t>(value) >> 16) & 0x8000);
  const float magnitude = std::fabs(value);
  if (value != value) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // from half-way above the largest number on
  const int exponent = int(bits<uint32_t>(magnitude) >> 23) - 127;
  const int quantum = exponent < -14 ? -24 : exponent - 10;  // of the last of the 11 bits
  const auto steps = static_cast<uint32_t>(std::nearbyint(magnitude * bits<float>(uint32_t(127 - quantum) << 23)));
  if (exponent < -14) return sign | static_cast<uint16_t>(steps);
  return sign | static_cast<uint16_t>(((quantum + 24) << 10) + steps);  // a carry moves on to the exponent
}

}  // namespace emu

struct __nv_bfloat16 {
  uint16_t raw;
};
struct __half {
  uint16_t raw;
};
inline __nv_bfloat16 __float2bfloat16(float value) { return {emu::float_to_bf16(value)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return emu::bf16_to_float(value.raw); }
inline __half __float2half(float value) { return {emu::float_to_f16(value)}; }
inline float __half2float(__half value) { return emu::f16_to_float(value.raw); }
