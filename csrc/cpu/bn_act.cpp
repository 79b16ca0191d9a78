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

template <typename T>
struct Silu {
  static constexpr bool kKeeps = true;
  using A = Acc<T>;
  using V = Vec<A>;

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

  V value(V z) const { return z * Gate(z).s; }
  V gradient(V dout, V z) const {
    const Gate g(z);
    return dout * g.s * fma(z, g.complement, splat(A(1)));
  }
};

// Calls f with what makes the activation.
template <typename F>
void with_activation(Activation act, F&& f) {
  if (act.kind == Activation::silu) return f([](auto* t) { return Silu<std::remove_pointer_t<decltype(t)>>(); });
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
