// The kernels' dtypes on the host, emulated or CUDA's own: conversions, names, and random numbers of each.
#pragma once

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <type_traits>

#if defined(RAN_EMULATE)
#include "number_types.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../../csrc/common/types.h"

namespace check {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline double value(float x) { return x; }
inline double value(bf16 x) { return __bfloat162float(x); }
inline double value(f16 x) { return __half2float(x); }
template <typename T>
T make(double x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(static_cast<float>(x));
  if constexpr (std::is_same_v<T, f16>) return __float2half(static_cast<float>(x));
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(x);
}

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr ran::DType dtype = ran::DType::f32;
  static constexpr const char* name = "float32";
  static constexpr double ulp = 0x1p-23, tiny = 0x1p-149;
};
template <>
struct Type<bf16> {
  static constexpr ran::DType dtype = ran::DType::bf16;
  static constexpr const char* name = "bfloat16";
  static constexpr double ulp = 0x1p-7, tiny = 0x1p-133;
};
template <>
struct Type<f16> {
  static constexpr ran::DType dtype = ran::DType::f16;
  static constexpr const char* name = "float16";
  static constexpr double ulp = 0x1p-10, tiny = 0x1p-24;
};

// Whether the environment's variable `list` (names with spaces around each) is not set or holds `name`.
inline bool wanted(const char* list, const std::string& name) {
  const char* names = std::getenv(list);
  return !names || (" " + std::string(names) + " ").find(" " + name + " ") != std::string::npos;
}

// Calls body with a value of each dtype that RAN_DTYPES names.
template <typename Body>
void for_each_type(Body&& body) {
  const auto one = [&](auto type) {
    if (wanted("RAN_DTYPES", Type<decltype(type)>::name)) body(type);
  };
  one(float{});
  one(bf16{});
  one(f16{});
}

inline std::mt19937 random_bits{20261};

// One of [low, high], rounded to T; a whole one where `whole`.
template <typename T>
T random_number(double low, double high, bool whole) {
  const double u = low + (high - low) * (random_bits() * 0x1p-32);
  return make<T>(whole ? std::floor(u + 0.5) : u);
}

}  // namespace check
