// Batch normalisation with given statistics and an activation, on the CPU, as ops of torch: schema, checks. They have
// no derivative; ran_ext/_recipe.py calls them below autograd.
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>

#include "../batch_norm/bn_relu.h"
#include "../common/kernels.h"

namespace ran {
namespace {

constexpr const char* kBnAct = "bn_act";

Activation activation_of(c10::string_view name, double a, double b) {
  static constexpr std::array<const char*, 6> kNames = {"none", "relu", "leaky_relu", "hardtanh", "hardswish", "silu"};
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  RAN_CHECK_VALUE(found != kNames.end(), kBnAct, "there is no activation '", name, "'");
  return {Activation::Kind(found - kNames.begin()), a, b};
}

Tensor bn_act(const Tensor& x_, const OptTensor& weight, const OptTensor& bias, const Tensor& mean, const Tensor& var,
              double eps, c10::string_view act, double a, double b) {
  const Tensor x = dense_activation(kBnAct, x_);
  const BatchNormArgs bn(kBnAct, x, weight, bias, mean, var, eps);
  const Activation activation = activation_of(act, a, b);
  Tensor out = at::empty_like(x);
  if (x.numel() > 0)
    cpu_kernels().bn_act_forward(out.data_ptr(), x.const_data_ptr(), dtype_of(x, kBnAct, "x"), view_of(x), bn.kernel,
                                 activation);
  return out;
}

// `wanted`: dx, and the gradients of weight and bias; of what is not wanted, an empty tensor.
std::tuple<Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout_, const Tensor& x_, const OptTensor& weight,
                                                   const OptTensor& bias, const Tensor& mean, const Tensor& var,
                                                   double eps, bool batch_stats, c10::string_view act, double a,
                                                   double b, std::array<bool, 3> wanted) {
  const Tensor x = dense_activation(kBnAct, x_), dout = gradient_like(kBnAct, dout_, x);
  const BatchNormArgs bn(kBnAct, x, weight, bias, mean, var, eps);
  const Activation activation = activation_of(act, a, b);
  const DType dtype = dtype_of(x, kBnAct, "x");
  const ChannelView view = view_of(x);
  const bool some = x.numel() > 0, sums = wanted[1] || wanted[2] || (wanted[0] && batch_stats);
  const auto none = [](const Tensor& like) { return at::empty({0}, like.options()); };
  Tensor dx = wanted[0] ? at::empty_like(x) : none(x);
  Tensor dz = sums ? at::zeros_like(bn.mean) : none(bn.mean), dz_xhat = sums ? at::zeros_like(bn.mean) : none(bn.mean);
  if (some && sums)
    cpu_kernels().bn_act_backward_reduce(dz.data_ptr(), dz_xhat.data_ptr(), dout.const_data_ptr(), x.const_data_ptr(),
                                         dtype, view, bn.kernel, activation);
  if (some && wanted[0])
    cpu_kernels().bn_act_backward_apply(
        dx.data_ptr(), dout.const_data_ptr(), x.const_data_ptr(), batch_stats ? dz.data_ptr() : nullptr,
        batch_stats ? dz_xhat.data_ptr() : nullptr, double(view.count()), dtype, view, bn.kernel, activation);
  return {dx, wanted[1] ? dz_xhat : none(bn.mean), wanted[2] ? dz : none(bn.mean)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def(
      "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act, float a=0, float "
      "b=0) -> Tensor");
  m.def(
      "bn_act_backward(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool "
      "batch_stats, str act, float a=0, float b=0, bool[3] wanted=[True, True, True]) -> (Tensor dx, Tensor dweight, "
      "Tensor dbias)");
}
TORCH_LIBRARY_IMPL(ran_ext, CPU, m) {
  m.impl("bn_act", bn_act);
  m.impl("bn_act_backward", bn_act_backward);
}

}  // namespace ran
