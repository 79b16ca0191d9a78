// Batch normalisation and any activation, or none, forward and backward, over dense NCHW and channels_last tensors.
#include "bn_passes.h"
#include "sigmoid.h"

namespace ran::cpu::RAN_ISA {
namespace {

// NaN, infinities and the slopes at the kinks are torch's. Where its vectors and its scalars differ, which is in the
// gradient of a NaN, hardswish makes one and hardtanh lets `dout` through.

// One of those that compare and multiply. It is chosen for every vector: the passes wait for memory, and loops for each
// would take longer to compile, for every instruction set.
template <typename T>
struct Piecewise {
  static constexpr bool kKeeps = false;
  using A = Acc<T>;
  using V = Vec<A>;
  Activation::Kind kind;
  A a, b;
  explicit Piecewise(Activation act) : kind(act.kind), a(A(act.a)), b(A(act.b)) {}

  V value(V z) const {
    switch (kind) {
      case Activation::relu:
        return relu(z);
      case Activation::leaky_relu:
        return z > V{} ? z : z * a;
      case Activation::hardtanh:
        return z < a ? splat(a) : z > b ? splat(b) : z;
      case Activation::hardswish: {
        const V rest = z + A(3);
        return z * A(1.0 / 6) * (rest < A(0) ? V{} : rest > A(6) ? splat(A(6)) : rest);
      }
      default:
        return z;
    }
  }

  V gradient(V dout, V z) const {
    switch (kind) {
      case Activation::relu:
        return relu_backward(dout, z);
      case Activation::leaky_relu:
        return z > V{} ? dout : dout * a;
      case Activation::hardtanh:
        return z <= a ? V{} : z >= b ? V{} : dout;
      case Activation::hardswish: {
        const V between = dout * fma(z, splat(A(1.0 / 3)), splat(A(0.5)));
        return z <= A(-3) ? V{} : z >= A(3) ? dout : between;
      }
      default:
        return dout;
    }
  }
};

// The normal distribution up to z, and its density there.
template <typename A>
struct Normal {
  Vec<A> cdf, pdf;
};

[[maybe_unused]] inline Normal<double> normal(Vec<double> z) {  // not used by the set of bfloat16 alone
  Normal<double> n;
  for (int i = 0; i < VecOf<double>::lanes; ++i) {
    n.cdf[i] = 0.5 * std::erfc(-z[i] * M_SQRT1_2);
    n.pdf[i] = std::exp(-0.5 * z[i] * z[i]) * (0.5 * M_2_SQRTPI * M_SQRT1_2);
  }
  return n;
}

// The tail beyond |z| is exp(-z^2 / 2) times a polynomial in 1 / (1 + 0.35 |z|), of all the one whose largest relative
// error up to |z| = 13.5 is the smallest (3e-8). Beyond 13 the density leaves the normal range; it is 0 there, as
// torch's is: so the product with an infinity is NaN.
inline Normal<float> normal(Vec<float> z) {
  const Vec<float> y = clamp(z < Vec<float>{} ? -z : z, 0.0f, 14.0f), t = reciprocal(fma(y, splat(0.35f), splat(1.0f)));
  Vec<float> e = exp(y * y * -0.5f);
  e = y > 13.0f ? Vec<float>{} : e;
  Vec<float> p = splat(-0.0277930349f);
  p = fma(p, t, splat(0.136930808f));
  p = fma(p, t, splat(-0.239938170f));
  p = fma(p, t, splat(0.139258370f));
  p = fma(p, t, splat(-0.00754786097f));
  p = fma(p, t, splat(0.0977275670f));
  p = fma(p, t, splat(0.122314036f));
  p = fma(p, t, splat(0.139376581f));
  p = fma(p, t, splat(0.139674112f));
  p = fma(p, t, splat(-2.41884322e-6f));
  p *= e;
  return {z > Vec<float>{} ? 1.0f - p : p, e * 0.398942280f};
}

// One of those that take an exponential.
template <typename T>
struct Smooth {
  static constexpr bool kKeeps = true;
  using A = Acc<T>;
  using V = Vec<A>;
  Activation::Kind kind;
  explicit Smooth(Activation act) : kind(act.kind) {}

  // The sigmoid and 1 - it, to all digits for 16-bit values too: errors of one sign would stay in the sums. The ends
  // are 0 as torch's are: so the product with an infinity is NaN, and that with a large number is not.
  struct Gate {
    V s, complement;
    explicit Gate(V z) {
      constexpr A kEnd = sizeof(A) == sizeof(double) ? A(708) : A(87);
      const V e = exp(-z);
      s = reciprocal(1 + e);
      complement = z > kEnd ? V{} : e * s;
      s = z < -kEnd ? V{} : s;
    }
  };

  // GELU's approximation is z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3).
  static constexpr A kLinear = A(1.5957691216057307), kCubic = A(0.071354816272600252);

  V value(V z) const {
    switch (kind) {
      case Activation::gelu:
        return z * normal(z).cdf;
      case Activation::gelu_tanh:
        return z * Gate(z * fma(z * z, splat(kCubic), splat(kLinear))).s;
      default:
        return z * Gate(z).s;
    }
  }

  V gradient(V dout, V z) const {
    if (kind == Activation::gelu) {
      const Normal<A> n = normal(z);
      return dout * fma(z, n.pdf, n.cdf);
    }
    V inner = z, slope = z;  // the sigmoid's argument, and z times its derivative
    if (kind == Activation::gelu_tanh) {
      const V square = z * z;
      inner = z * fma(square, splat(kCubic), splat(kLinear));
      slope = z * fma(square, splat(3 * kCubic), splat(kLinear));
    }
    const Gate g(inner);
    return dout * g.s * fma(slope, g.complement, splat(A(1)));
  }
};

// Calls f with what makes the activation.
template <typename F>
void with_activation(Activation act, F&& f) {
  if (act.is_smooth()) return f([act](auto* t) { return Smooth<std::remove_pointer_t<decltype(t)>>(act); });
  f([act](auto* t) { return Piecewise<std::remove_pointer_t<decltype(t)>>(act); });
}

}  // namespace

void bn_act_forward(void* out, const void* x, DType dtype, ChannelView v, BatchNorm<void> bn, Activation act) {
  with_activation(act, [&](auto make) { bn_forward(make, out, x, dtype, v, bn); });
}

void bn_act_backward_reduce(void* kept, void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                            ChannelView v, BatchNorm<void> bn, Activation act) {
  with_activation(act, [&](auto make) { bn_backward_reduce(make, kept, sum_dz, sum_dz_xhat, dout, x, dtype, v, bn); });
}

void bn_act_backward_apply(void* dx, const void* dout, const void* x, const void* sum_dz, const void* sum_dz_xhat,
                           double count, DType dtype, ChannelView v, BatchNorm<void> bn, Activation act) {
  with_activation(
      act, [&](auto make) { bn_backward_apply(make, dx, dout, x, nullptr, sum_dz, sum_dz_xhat, count, dtype, v, bn); });
}

}  // namespace ran::cpu::RAN_ISA
