// Sums of vectors in double.
#pragma once

#include "vec.h"

namespace ran::cpu::RAN_ISA {

// Floats as doubles, from memory or the halves of a vector: GCC 12 converts a vector through memory.
#if !defined(RAN_AVX512) && !defined(RAN_AVX2)
typedef float HalfVec __attribute__((vector_size(kBytes / 2)));
inline Vec<double> wide_at(const void* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Vec<double>);
}
#endif
inline Vec<double> load_wide(const float* p) {
#if defined(RAN_AVX512)
  return _mm512_maskz_cvtps_pd(__mmask8(kEvery), _mm256_loadu_ps(p));
#elif defined(RAN_AVX2)
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return wide_at(p);
#endif
}
inline Vec<double> low_wide(Vec<float> v) {
#if defined(RAN_AVX512)
  return _mm512_maskz_cvtps_pd(__mmask8(kEvery), _mm512_castps512_ps256(v));
#elif defined(RAN_AVX2)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
#else
  return wide_at(&v);
#endif
}
inline Vec<double> high_wide(Vec<float> v) {
#if defined(RAN_AVX512)
  return _mm512_maskz_cvtps_pd(__mmask8(kEvery), _mm512_extractf32x8_ps(v, 1));
#elif defined(RAN_AVX2)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  return wide_at(reinterpret_cast<const char*>(&v) + sizeof v / 2);
#endif
}

// The sum of vectors, each lane in double: of whole numbers it is exact, and no sum of floats leaves its range.
template <typename A>
struct WideSum {
  static constexpr int parts = int(sizeof(double) / sizeof(A)), lanes = VecOf<double>::lanes;
  Vec<double> part[parts] = {};

  typedef A Part __attribute__((vector_size(kBytes / parts)));
  // Of a vector's sums, as store_to() left them.
  static WideSum at(const double* p) {
    WideSum sum;
    std::memcpy(sum.part, p, sizeof sum.part);
    return sum;
  }
  void operator+=(Vec<A> v) {
    if constexpr (parts == 1)
      part[0] += v;
    else
      part[0] += low_wide(v), part[1] += high_wide(v);
  }
  WideSum operator+(WideSum other) const {
    for (int i = 0; i < parts; ++i) other.part[i] += part[i];
    return other;
  }
  void store_to(double* p, int n) const { std::memcpy(p, part, size_t(n) * sizeof(double)); }
  double total() const {
    double sum = 0;
    for (int i = 0; i < parts; ++i)
      for (int lane = 0; lane < lanes; ++lane) sum += part[i][lane];
    return sum;
  }
  Vec<A> rounded() const {
    Vec<A> v;
    for (int i = 0; i < parts; ++i) {
      const Part p = __builtin_convertvector(part[i], Part);
      std::memcpy(reinterpret_cast<A*>(&v) + i * lanes, &p, sizeof p);
    }
    return v;
  }
};

}  // namespace ran::cpu::RAN_ISA
