// One SIMD vector of accumulators (float, or double for double data) and its loads and stores from any dtype.
//
// Every file of cpu/ is compiled once for each instruction set, with RAN_ISA naming the namespace; _build/native.py
// holds the flags. Arithmetic is GCC's vector extension, so that `a * b + c` reads as it does on paper; only what that
// extension lacks is an intrinsic.
#pragma once

// What intrinsics there are. RAN_VECTOR_BYTES: none, vectors of so many bytes, whatever the processor has; tests so run
// the kernels of one that is not at hand.
#if defined(RAN_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define RAN_AVX512
#elif defined(__AVX2__)
#define RAN_AVX2
#elif defined(__aarch64__)
#define RAN_NEON
#endif
#if defined(RAN_AVX512) || defined(RAN_AVX2)
#include <immintrin.h>
#elif defined(RAN_NEON)
#include <arm_neon.h>
#endif
// Where products and sums are one instruction the convolutions have kernels.
#if defined(RAN_AVX512) || defined(RAN_AVX2) || defined(RAN_NEON) || defined(RAN_VECTOR_BYTES)
#define RAN_FMA
#endif
// Pairs of bfloat16 that one instruction multiplies and adds; RAN_BF16_PAIRS: in software, for tests.
#if defined(RAN_AVX512) && defined(__AVX512BF16__)
#define RAN_BF16_PAIRS
#define RAN_BF16_ALONE  // see with_dtype
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/types.h"

// GCC 12 keeps arrays of vectors in memory unless the loops over them are unrolled before all else, and passes them in
// memory to a function that it does not inline.
#define RAN_UNROLL _Pragma("GCC unroll 16")
#define RAN_ALWAYS __attribute__((always_inline))  // behind a lambda's arguments
#define RAN_INLINE inline RAN_ALWAYS

#ifndef RAN_ISA
#error "compile with -DRAN_ISA=baseline|avx2|avx512|avx512_bf16; _build/native.py does"
#endif

namespace ran::cpu::RAN_ISA {

#if defined(RAN_VECTOR_BYTES)
constexpr int kBytes = RAN_VECTOR_BYTES;
#elif defined(RAN_AVX512)
constexpr int kBytes = 64;
#elif defined(RAN_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kBytes)));
  static constexpr int lanes = kBytes / int(sizeof(A));
};
template <typename A>
using Vec = typename VecOf<A>::type;

constexpr int kLanes = VecOf<float>::lanes;

typedef uint16_t Half16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kBytes)));
typedef int32_t Int32 __attribute__((vector_size(kBytes)));

constexpr int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <typename A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

// Lane i of the result is lane kFrom[i] of a and b side by side.
template <int... kFrom>
inline Vec<float> shuffle(Vec<float> a, Vec<float> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, Int32{kFrom...});
#endif
}

inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(RAN_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(RAN_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(RAN_NEON)
  return vfmaq_f32(c, a, b);
#else
  for (int i = 0; i < VecOf<float>::lanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(RAN_AVX512)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(RAN_AVX2)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(RAN_NEON)
  return vfmaq_f64(c, a, b);
#else
  for (int i = 0; i < VecOf<double>::lanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// x, or the end of [low, high] that it lies beyond; NaN stays NaN: of it and a number the instructions give the second.
inline Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(RAN_AVX512)
  return _mm512_max_ps(splat(low), _mm512_min_ps(splat(high), x));
#elif defined(RAN_AVX2)
  return _mm256_max_ps(splat(low), _mm256_min_ps(splat(high), x));
#else
  x = x > high ? splat(high) : x;
  return x < low ? splat(low) : x;
#endif
}

// The nearest whole number.
inline Vec<float> round(Vec<float> x) {
#if defined(RAN_AVX512)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(RAN_AVX2)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23, beyond which floats have no fraction; for |x| < 2^22
  return (x + magic) - magic;
#endif
}

// x * 2^k for a whole k from -126 to 127.
inline Vec<float> scale(Vec<float> x, Vec<float> k) {
#if defined(RAN_AVX512)
  return _mm512_scalef_ps(x, k);
#else
  const Bits32 bits = Bits32(__builtin_convertvector(k, Int32) + 127) << 23;
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof power);
  return x * power;
#endif
}

// 1 / x to within 2 ulp, of an x whose reciprocal is no subnormal number: the division takes longer than exp.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(RAN_AVX512)
  const Vec<float> r = _mm512_rcp14_ps(x);
  return fma(r, fma(-x, r, splat(1.0f)), r);
#else
  return 1 / x;
#endif
}
inline Vec<double> reciprocal(Vec<double> x) { return 1 / x; }

// 1 / x to within 2^-14: enough where the result is rounded to 16 bits.
inline Vec<float> reciprocal_short(Vec<float> x) {
#if defined(RAN_AVX512)
  return _mm512_rcp14_ps(x);
#else
  return 1 / x;
#endif
}

// torch.relu keeps NaN.
template <typename V>
inline V relu(V x) {
  return x <= V{} ? V{} : x;
}
// As relu_backward() of formulas.h.
template <typename V>
inline V relu_backward(V dout, V z) {
  return z <= V{} ? V{} : dout;
}

#if defined(RAN_AVX512)
constexpr __mmask16 kEvery = 0xffff;  // lane; without a mask GCC 12 warns of an uninitialised value that there is not
#endif

// The conversions between lanes of 16 and 32 bits: GCC 12 takes four instructions for what is one.
inline Bits32 widen(Half16 h) {
#if defined(RAN_AVX512)
  return Bits32(_mm512_maskz_cvtepu16_epi32(kEvery, __m256i(h)));
#elif defined(RAN_AVX2)
  return Bits32(_mm256_cvtepu16_epi32(__m128i(h)));
#else
  return __builtin_convertvector(h, Bits32);
#endif
}

inline Half16 narrow(Bits32 bits) {
#if defined(RAN_AVX512)
  return Half16(_mm512_maskz_cvtepi32_epi16(kEvery, __m512i(bits)));
#elif defined(RAN_AVX2)
  const __m256i lanes = __m256i(bits);
  return Half16(_mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1)));
#else
  return __builtin_convertvector(bits, Half16);
#endif
}

// bfloat16, to nearest even. A NaN that arithmetic made has its quiet bit set and stays one without its lower half.
inline Half16 to_bf16(Vec<float> x) {
#if defined(RAN_AVX512) && defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // which the instruction would make 0, and torch keeps
  if (__builtin_expect(!_mm512_fpclass_ps_mask(x, kSubnormal), true)) return Half16(_mm512_cvtneps_pbh(x));
#endif
  Bits32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Bits32 rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  return narrow((x == x ? rounded : bits) >> 16);
}

inline Vec<float> from_bf16(Half16 h) {
  const Bits32 bits = widen(h) << 16;
  Vec<float> x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

#if !defined(RAN_AVX512) && !defined(RAN_AVX2) && !defined(RAN_NEON)
// float16 as the processors' own instructions have it, also where subnormal numbers are flushed to zero.
inline Vec<float> from_f16(Half16 h) {
  const Bits32 bits = widen(h), sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const Bits32 exponent = magnitude & 0x0f800000u;
  const Bits32 infinite = Bits32(exponent == 0x0f800000u), subnormal = Bits32(exponent == 0u);
  const Bits32 moved = magnitude + (112u << 23) + (infinite & (112u << 23)) + (subnormal & (1u << 23));
  const Bits32 exact = Bits32(Vec<float>(moved) - Vec<float>(subnormal & (113u << 23)));
  return Vec<float>(sign | (subnormal & exact) | (~subnormal & moved));
}

// To nearest even; of a NaN the upper bits stay.
inline Half16 to_f16(Vec<float> x) {
  const Bits32 bits = Bits32(x), magnitude = bits & 0x7fffffffu;
  const Bits32 nan = Bits32(magnitude > 0x7f800000u), large = Bits32(magnitude >= (143u << 23));
  const Bits32 small = Bits32(magnitude < (113u << 23));
  const Bits32 infinite = 0x7c00u | (nan & (0x200u | (magnitude >> 13 & 0x3ffu)));
  const Bits32 subnormal = Bits32(Vec<float>(magnitude) + 0.5f) - (126u << 23);  // the addition rounds
  const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const Bits32 found = (large & infinite) | (~large & ((small & subnormal) | (~small & normal)));
  return narrow((bits >> 16 & 0x8000u) | found);
}
#endif

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const bf16* p) {
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  return from_bf16(h);
}
inline Vec<float> load(const f16* p) {
#if defined(RAN_AVX512)
  return _mm512_maskz_cvtph_ps(kEvery, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(RAN_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(RAN_NEON)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  return from_f16(h);
#endif
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vec<float> v) {
  const Half16 h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
inline void store(f16* p, Vec<float> v) {
#if defined(RAN_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(kEvery, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(RAN_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(RAN_NEON)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  const Half16 h = to_f16(v);
  std::memcpy(p, &h, sizeof h);
#endif
}

// The first `n` lanes; the others read as 0 and are not written.
template <typename T>
inline Vec<Acc<T>> load(const T* p, int n) {
  if (n == VecOf<Acc<T>>::lanes) return load(p);
  T lanes[VecOf<Acc<T>>::lanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store(T* p, Vec<Acc<T>> v, int n) {
  if (n == VecOf<Acc<T>>::lanes) return store(p, v);
  T lanes[VecOf<Acc<T>>::lanes];
  store(lanes, v);
  std::memcpy(p, lanes, size_t(n) * sizeof(T));
}

inline float to_float(float x) { return x; }
template <typename T>
inline float to_float(T x) {
  return load(&x, 1)[0];
}

// v as memory of type T holds it.
template <typename T>
inline Vec<float> rounded_to(Vec<float> v) {
  if constexpr (std::is_same_v<T, float>) return v;
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

// Calls body(i, n) for i = 0, lanes, 2 * lanes, ...; n is `lanes`, or what is left at the end. Inlined, the body is
// there twice: where n is the constant `lanes` the partial loads and stores above become whole ones.
template <typename A, typename Body>
inline void for_lanes(int64_t size, Body&& body) {
  constexpr int lanes = VecOf<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) body(i, lanes);
  if (i < size) body(i, int(size - i));
}

template <typename V>
inline bool is_finite(V v) {
  const V zero = v - v;  // NaN of an infinity or NaN
  uint64_t words[sizeof v / 8], any = 0;
  std::memcpy(words, &zero, sizeof v);
  for (uint64_t word : words) any |= word;
  return any == 0;
}

// The first `n` lanes; the others become 0.
template <typename V>
inline V first(V v, int n) {
  if (n * sizeof v[0] == sizeof v) return v;
  V kept{};
  std::memcpy(&kept, &v, size_t(n) * sizeof v[0]);
  return kept;
}

// Values of one dtype as those of another with the same accumulator.
template <typename To, typename From>
inline void convert(To* to, const From* from, int64_t size) {
  for_lanes<Acc<To>>(size, [&](int64_t i, int n) { store(to + i, load(from + i, n), n); });
}

template <typename A>
inline double sum(Vec<A> v) {
  double total = 0;
  for (int i = 0; i < VecOf<A>::lanes; ++i) total += double(v[i]);
  return total;
}

// Calls f with a null pointer of the dtype's C++ type; of those whose accumulators are float. With the instructions for
// bfloat16 there is that dtype alone: of the others they would make what the set without them has.
template <typename F>
inline void with_float_acc([[maybe_unused]] DType dtype, F&& f) {
#if !defined(RAN_BF16_ALONE)
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::f16) return f(static_cast<f16*>(nullptr));
#endif
  f(static_cast<bf16*>(nullptr));
}

// The same of all.
template <typename F>
inline void with_dtype(DType dtype, F&& f) {
#if !defined(RAN_BF16_ALONE)
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
#endif
  with_float_acc(dtype, f);
}

}  // namespace ran::cpu::RAN_ISA
