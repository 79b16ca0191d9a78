// The one-dimensional transforms of Winograd F(m, 3): m outputs of a 3-tap filter from m + 2 inputs
// by m + 2 multiplications (Winograd 1980; Lavin and Gray 2016). Two-dimensional ones apply them along both axes.
//
//   input     B^T d   m + 2 inputs       -> points     weight    G g     3 taps            -> points
//   output    A^T p   points             -> m outputs  gradient  A dy    m output's ones   -> points
//   taps      G^T p   points' products   -> 3 taps
#pragma once

#include "vec.h"

namespace ran::cpu::RAN_ISA {

template <int kOutputs>
struct Winograd;

// Points 0, 1, -1, infinity.
template <>
struct Winograd<2> {
  static constexpr int m = 2, n = 4;
  using V = Vec<float>;

  static RAN_INLINE void input(V* o, const V* d) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[1] - d[3];
  }
  static RAN_INLINE void output(V* o, const V* p) {
    o[0] = p[0] + p[1] + p[2];
    o[1] = p[1] - p[2] - p[3];
  }
  static RAN_INLINE void weight(V* o, const V* g) {
    const V even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    o[0] = g[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = g[2];
  }
  static RAN_INLINE void gradient(V* o, const V* y) {
    o[0] = y[0];
    o[1] = y[0] + y[1];
    o[2] = y[0] - y[1];
    o[3] = -y[1];
  }
  static RAN_INLINE void taps(V* o, const V* p) {
    const V even = 0.5f * (p[1] + p[2]);
    o[0] = p[0] + even;
    o[1] = 0.5f * (p[1] - p[2]);
    o[2] = even + p[3];
  }
};

// Points 0, a, -a, b, -b, infinity with a = 5/8 and b = 3/2, whose error is less than half of that with 1 and 2 (of
// such choices, see Barabasz, Anderson, Soodhalter and Gray 2018).
template <>
struct Winograd<4> {
  static constexpr int m = 4, n = 6;
  using V = Vec<float>;
  static constexpr double a = 0.625, b = 1.5, A = a * a, B = b * b;
  static constexpr double at_0 = 1 / (A * B), at_a = 1 / (2 * A * (A - B)), at_b = 1 / (2 * B * (B - A));  // of G

  static RAN_INLINE V times(double factor, V v) { return float(factor) * v; }

  static RAN_INLINE void input(V* o, const V* d) {
    const V even_a = d[4] - times(B, d[2]), odd_a = d[3] - times(B, d[1]);
    const V even_b = d[4] - times(A, d[2]), odd_b = d[3] - times(A, d[1]);
    o[0] = times(A * B, d[0]) + (d[4] - times(A + B, d[2]));
    o[1] = even_a + times(a, odd_a);
    o[2] = even_a - times(a, odd_a);
    o[3] = even_b + times(b, odd_b);
    o[4] = even_b - times(b, odd_b);
    o[5] = times(A * B, d[1]) + (d[5] - times(A + B, d[3]));
  }
  static RAN_INLINE void output(V* o, const V* p) {
    const V even_a = p[1] + p[2], odd_a = p[1] - p[2], even_b = p[3] + p[4], odd_b = p[3] - p[4];
    o[0] = p[0] + (even_a + even_b);
    o[1] = times(a, odd_a) + times(b, odd_b);
    o[2] = times(A, even_a) + times(B, even_b);
    o[3] = times(a * A, odd_a) + (times(b * B, odd_b) + p[5]);
  }
  static RAN_INLINE void weight(V* o, const V* g) {
    const V even_a = times(at_a, g[0]) + times(at_a * A, g[2]), even_b = times(at_b, g[0]) + times(at_b * B, g[2]);
    o[0] = times(at_0, g[0]);
    o[1] = even_a + times(at_a * a, g[1]);
    o[2] = even_a - times(at_a * a, g[1]);
    o[3] = even_b + times(at_b * b, g[1]);
    o[4] = even_b - times(at_b * b, g[1]);
    o[5] = g[2];
  }
  static RAN_INLINE void gradient(V* o, const V* y) {
    const V even_a = y[0] + times(A, y[2]), odd_a = y[1] + times(A, y[3]);
    const V even_b = y[0] + times(B, y[2]), odd_b = y[1] + times(B, y[3]);
    o[0] = y[0];
    o[1] = even_a + times(a, odd_a);
    o[2] = even_a - times(a, odd_a);
    o[3] = even_b + times(b, odd_b);
    o[4] = even_b - times(b, odd_b);
    o[5] = y[3];
  }
  static RAN_INLINE void taps(V* o, const V* p) {
    const V even_a = p[1] + p[2], odd_a = p[1] - p[2], even_b = p[3] + p[4], odd_b = p[3] - p[4];
    o[0] = times(at_0, p[0]) + (times(at_a, even_a) + times(at_b, even_b));
    o[1] = times(at_a * a, odd_a) + times(at_b * b, odd_b);
    o[2] = times(at_a * A, even_a) + (times(at_b * B, even_b) + p[5]);
  }
};

}  // namespace ran::cpu::RAN_ISA
