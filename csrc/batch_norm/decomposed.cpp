#include "decomposed.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace ran::decomposed {
namespace {

// A vector of one value a channel, to be broadcast over (N, C, H, W).
Tensor along_channels(const Tensor& t) { return t.view({1, -1, 1, 1}); }

Tensor invstd(const BatchNormArgs& bn) { return at::rsqrt(bn.var + bn.kernel.eps); }

Tensor xhat(const Tensor& x, const BatchNormArgs& bn) {
  return (x - along_channels(bn.mean)) * along_channels(invstd(bn));
}

// dout where the ReLU let it through, as relu_backward() of formulas.h: NaN passes.
Tensor masked(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn) {
  const Tensor z = at::batch_norm(x, bn.weight, bn.bias, bn.mean, bn.var, false, 0.0, bn.kernel.eps, false);
  return dout.masked_fill(z <= 0, 0);
}

}  // namespace

Tensor bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
               bool batch_stats, double eps) {
  // In channels_last torch's derivative takes these for contiguous, whatever their strides are (2.13, on the CPU).
  const OptTensor given_mean = batch_stats ? OptTensor() : OptTensor(mean.contiguous());
  const OptTensor given_var = batch_stats ? OptTensor() : OptTensor(var.contiguous());
  const OptTensor dense_weight = weight.defined() ? OptTensor(weight.contiguous()) : OptTensor();
  return at::relu(at::batch_norm(x, dense_weight, bias, given_mean, given_var, batch_stats, 0.0, eps, false));
}

BackwardSums bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn) {
  const Tensor dz = masked(dout, x, bn);
  return {dz.sum({0, 2, 3}), (dz * xhat(x, bn)).sum({0, 2, 3})};
}

Tensor bn_relu_dx(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn, const BackwardSums* sums,
                  double count) {
  Tensor dx = masked(dout, x, bn);
  if (sums) dx = dx - along_channels(sums->dz / count) - xhat(x, bn) * along_channels(sums->dz_xhat / count);
  return dx * along_channels(bn.weight.defined() ? invstd(bn) * bn.weight : invstd(bn));
}

}  // namespace ran::decomposed
