// The sigmoid of a vector of logits, and the gradient that it lets through.
#pragma once

#include "vec.h"

namespace ran::cpu::RAN_ISA {

// The ends of exp are clamped where the result would leave the normal range: sigmoid, which cannot tell it from 0 and
// 1, stays above 0, so that it may be multiplied by an infinity. NaN stays NaN.

// exp to within 1 ulp: 2^k * p(r), with x = k ln 2 + r and ln 2 in two parts (Cody and Waite 1980).
inline Vec<float> exp(Vec<float> x) {
  x = clamp(x, -87.0f, 88.0f);
  const Vec<float> k = round(x * 1.44269504f);
  Vec<float> r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return scale(p, k);
}

// 2^x to within 2^-13: enough where the result is rounded to the 8 or 11 bits of a 16-bit type. Of the polynomials that
// give 1 for 0 this one's largest relative error is the smallest.
inline Vec<float> exp2_short(Vec<float> x) {
  x = clamp(x, -126.0f, 126.0f);
  const Vec<float> k = round(x), r = x - k;
  Vec<float> p = splat(0.0550088262f);
  p = fma(p, r, splat(0.242211356f));
  p = fma(p, r, splat(0.693282982f));
  p = fma(p, r, splat(1.0f));
  return scale(p, k);
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = std::exp(x[i] > 709.0 ? 709.0 : x[i]);
  return x;
}

template <typename T>
struct Sigmoid {
  Vec<Acc<T>> s, complement;  // complement = 1 - s, without the cancellation
  explicit Sigmoid(Vec<Acc<T>> mask) {
    Vec<Acc<T>> e;
    if constexpr (sizeof(T) == 2) {
      e = exp2_short(mask * -1.44269504f);
      s = reciprocal_short(1 + e);
    } else {
      e = exp(-mask);
      s = 1 / (1 + e);
    }
    complement = e * s;
  }

  // The gradient of the mask, `product` being dout * trunk. Of an infinity torch makes NaN where its own gate, rounded
  // to T as its mask is, is 0 or 1: there the slope is worked out as torch does.
  Vec<Acc<T>> gradient(Vec<Acc<T>> product, Vec<Acc<T>> mask) const {
    if (__builtin_expect(is_finite(product), true)) return product * s * complement;
    T stored[VecOf<Acc<T>>::lanes];
    store(stored, mask);
    Vec<Acc<T>> exact = load(stored);
    for (int i = 0; i < VecOf<Acc<T>>::lanes; ++i) exact[i] = 1 / (1 + std::exp(-exact[i]));
    store(stored, exact);
    exact = load(stored);
    return product - product == 0 ? product * s * complement : product * exact * (1 - exact);
  }
};

}  // namespace ran::cpu::RAN_ISA
