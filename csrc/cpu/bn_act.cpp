// Batch normalisation and any activation, or none, forward and backward, over dense NCHW and channels_last tensors.
#include "bn_passes.h"
#include "sigmoid.h"

namespace ran::cpu::RAN_ISA {
namespace {

// An activation that is chosen for every vector: the passes wait for memory, and loops for each would take four
// instruction sets times as long to compile. NaN, infinities and the slopes at the kinks are torch's; where its vectors
// and its scalars differ, which is at the gradient of a NaN, hardswish makes one and hardtanh lets `dout` through.
template <typename T>
struct Chosen {
  using A = Acc<T>;
  using V = Vec<A>;
  Activation::Kind kind;
  A a, b;
  explicit Chosen(Activation act) : kind(act.kind), a(A(act.a)), b(A(act.b)) {}

  V value(V z) const {
    switch (kind) {
      case Activation::relu:
        return relu(z);
      case Activation::leaky_relu:
        return z > V{} ? z : z * a;
      case Activation::hardtanh:
        return z < a ? splat(a) : z > b ? splat(b) : z;
      case Activation::hardswish: {
        V rest = z + A(3);
        rest = rest < A(0) ? V{} : rest > A(6) ? splat(A(6)) : rest;
        return z * rest * A(1.0 / 6);
      }
      case Activation::silu:
        return z * gate(z).s;
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
      case Activation::silu: {
        const Sigmoid<T> g = gate(z);
        return dout * g.s * fma(z, g.complement, splat(A(1)));
      }
      default:
        return dout;
    }
  }

 private:
  // The sigmoid whose ends are 0, as torch's are: so the product with an infinity is NaN, and that with a large number
  // is not.
  static Sigmoid<T> gate(V z) {
    constexpr A kEnd = sizeof(A) == sizeof(double) ? A(708) : A(87);
    Sigmoid<T> g(z);
    g.s = z < -kEnd ? V{} : g.s;
    g.complement = z > kEnd ? V{} : g.complement;
    return g;
  }
};

auto make_chosen(Activation act) {
  return [act](auto* t) { return Chosen<std::remove_pointer_t<decltype(t)>>(act); };
}

}  // namespace

void bn_act_forward(void* out, const void* x, DType dtype, ChannelView v, BatchNorm<void> bn, Activation act) {
  bn_forward(make_chosen(act), out, x, dtype, v, bn);
}

void bn_act_backward_reduce(void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                            ChannelView v, BatchNorm<void> bn, Activation act) {
  bn_backward_reduce(make_chosen(act), sum_dz, sum_dz_xhat, dout, x, dtype, v, bn);
}

void bn_act_backward_apply(void* dx, const void* dout, const void* x, const void* sum_dz, const void* sum_dz_xhat,
                           double count, DType dtype, ChannelView v, BatchNorm<void> bn, Activation act) {
  bn_backward_apply(make_chosen(act), dx, dout, x, nullptr, sum_dz, sum_dz_xhat, count, dtype, v, bn);
}

}  // namespace ran::cpu::RAN_ISA
