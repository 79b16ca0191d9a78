#include "composed.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace ran::composed {
namespace {

Tensor upsampled(const Tensor& mask, const Tensor& trunk, int64_t scale) {
  if (scale == 1) return mask;
  return mask.repeat_interleave(scale, 2)
      .repeat_interleave(scale, 3)
      .narrow(2, 0, trunk.size(2))
      .narrow(3, 0, trunk.size(3));
}

// A vector of one value a channel, to be broadcast over (N, C, H, W).
Tensor along_channels(const Tensor& t) { return t.view({1, -1, 1, 1}); }

Tensor invstd(const BatchNormArgs& bn) { return at::rsqrt(bn.var + bn.kernel.eps); }

Tensor xhat(const Tensor& x, const BatchNormArgs& bn) {
  return (x - along_channels(bn.mean)) * along_channels(invstd(bn));
}

// dout where the ReLU let it through, as relu_backward() of math.h: NaN passes.
Tensor masked(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn) {
  const Tensor z = at::batch_norm(x, bn.weight, bn.bias, bn.mean, bn.var, false, 0.0, bn.kernel.eps, false);
  return dout.masked_fill(z <= 0, 0);
}

}  // namespace

Tensor attention_gate(const Tensor& trunk, const Tensor& mask, int64_t scale) {
  return (at::sigmoid(upsampled(mask, trunk, scale)) + 1) * trunk;
}

std::tuple<Tensor, Tensor> attention_gate_backward(const Tensor& dout, const Tensor& trunk, const Tensor& mask,
                                                   int64_t scale) {
  const Tensor s = at::sigmoid(upsampled(mask, trunk, scale));
  Tensor dmask = dout * trunk * s * (1 - s);
  if (scale != 1) {
    // Whole windows, then the sum over each.
    const int64_t h = mask.size(2), w = mask.size(3);
    dmask = at::constant_pad_nd(dmask, {0, w * scale - trunk.size(3), 0, h * scale - trunk.size(2)});
    dmask = dmask.reshape({mask.size(0), mask.size(1), h, scale, w, scale}).sum({3, 5});
  }
  return {dout * (1 + s), dmask};
}

Tensor bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
               bool batch_stats, double eps) {
  const OptTensor given_mean = batch_stats ? OptTensor() : OptTensor(mean);
  const OptTensor given_var = batch_stats ? OptTensor() : OptTensor(var);
  return at::relu(at::batch_norm(x, weight, bias, given_mean, given_var, batch_stats, 0.0, eps, false));
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

}  // namespace ran::composed
