// The formulas of the ops, each in one place, for the host and the device. No torch here.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RAN_HD __host__ __device__ __forceinline__
#else
#define RAN_HD inline
#endif

namespace ran {

// torch.relu keeps NaN; fmax(NaN, 0) would be 0.
template <typename T>
RAN_HD T relu(T x) {
  return x > T(0) || x != x ? x : T(0);
}

// The gradient that passes the ReLU of z; like torch's, it lets through what is not <= 0, NaN included.
template <typename T>
RAN_HD T relu_backward(T dout, T z) {
  return z <= T(0) ? T(0) : dout;
}

template <typename T>
RAN_HD T sigmoid(T x) {
  const T e = std::exp(-x);
#if defined(__CUDA_ARCH__)
  // Within 2 ulp, without the exact division's many instructions: the gate is to run at the memory's speed. Results
  // below 2^-126 become 0.
  if constexpr (sizeof(T) == sizeof(float)) return __fdividef(T(1), T(1) + e);
#endif
  return T(1) / (T(1) + e);
}

// out = (1 + sigmoid(mask)) * trunk.
template <typename T>
RAN_HD T gate(T trunk, T mask) {
  return (T(1) + sigmoid(mask)) * trunk;
}

// d out / d mask = trunk * s * (1 - s).
template <typename T>
RAN_HD T gate_dmask(T dout, T trunk, T mask) {
  const T s = sigmoid(mask);
  return dout * trunk * s * (T(1) - s);
}

// z = x * scale + shift is batch normalisation; forward, dgrad and wgrad all use this one expression, so that the
// sign of z, and with it the ReLU's mask, is the same in all three.
template <typename T>
struct ScaleShift {
  T scale, shift;
};

template <typename T>
RAN_HD ScaleShift<T> scale_shift(T mean, T var, T weight, T bias, T eps) {
  const T scale = weight / std::sqrt(var + eps);
  return {scale, std::fma(-mean, scale, bias)};
}

template <typename T>
RAN_HD T normalise(T x, ScaleShift<T> s) {
  return std::fma(x, s.scale, s.shift);
}

// Count, mean and sum of squared deviations of a set; merged by Chan, Golub and LeVeque 1979.
template <typename T>
struct Moments {
  T count, mean, m2;
};

template <typename T>
RAN_HD Moments<T> merge(Moments<T> a, Moments<T> b) {
  const T count = a.count + b.count;
  if (count == T(0)) return a;
  const T delta = b.mean - a.mean, share = b.count / count;
  return {count, std::fma(delta, share, a.mean), a.m2 + b.m2 + (a.count * delta) * (share * delta)};
}

// Batch normalisation's backward with the batch's own statistics: dx = a * dz + b * (x - mean) + c. Subtracting the
// mean first keeps the digits that b * x would lose where |mean| is much larger than the standard deviation.
template <typename T>
struct DxCoefficients {
  T a, b, c, mean;
};

template <typename T>
RAN_HD DxCoefficients<T> dx_coefficients(T mean, T var, T weight, T eps, T sum_dz, T sum_dz_xhat, T count) {
  const T invstd = T(1) / std::sqrt(var + eps);
  const T a = weight * invstd;
  return {a, -a * invstd * sum_dz_xhat / count, -a * sum_dz / count, mean};
}

template <typename T>
RAN_HD T dx(T dz, T x, DxCoefficients<T> k) {
  return std::fma(k.a, dz, std::fma(k.b, x - k.mean, k.c));
}

}  // namespace ran
