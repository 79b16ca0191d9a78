// Batch normalisation with given statistics and an activation, on the CPU, as ops of torch: schema, checks. They have
// no derivative; below them is what converted networks run, which has one.
#include "bn_act.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <array>

#include "../batch_norm/bn_relu.h"
#include "../common/autograd.h"
#include "../common/kernels.h"
#include "../conv/bn_relu_conv.h"

namespace ran {
namespace {

constexpr const char* kBnAct = "bn_act";

Activation activation_of(c10::string_view name, double a, double b) {
  static constexpr std::array<const char*, 8> kNames = {"none",      "relu", "leaky_relu", "hardtanh",
                                                        "hardswish", "silu", "gelu",       "gelu_tanh"};
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
    cpu_kernels(x).bn_act_forward(out.data_ptr(), x.const_data_ptr(), dtype_of(x, kBnAct, "x"), view_of(x), bn.kernel,
                                  activation);
  return out;
}

// `wanted`: dx, and the gradients of weight and bias; of what is not wanted, an empty tensor. `spent`: nobody needs
// dout's memory any more, and dx takes it.
std::tuple<Tensor, Tensor, Tensor> bn_act_gradients(const Tensor& dout_, const Tensor& x_, const OptTensor& weight,
                                                    const OptTensor& bias, const Tensor& mean, const Tensor& var,
                                                    double eps, bool batch_stats, c10::string_view act, double a,
                                                    double b, std::array<bool, 3> wanted, bool spent) {
  const Tensor x = dense_activation(kBnAct, x_), dout = gradient_like(kBnAct, dout_, x);
  const BatchNormArgs bn(kBnAct, x, weight, bias, mean, var, eps);
  const Activation activation = activation_of(act, a, b);
  const DType dtype = dtype_of(x, kBnAct, "x");
  const ChannelView view = view_of(x);
  const bool some = x.numel() > 0, sums = wanted[1] || wanted[2] || (wanted[0] && batch_stats);
  const auto none = [](const Tensor& like) { return at::empty({0}, like.options()); };
  Tensor dx = !wanted[0] ? none(x) : spent ? dout : at::empty_like(x);
  Tensor dz = sums ? at::zeros_like(bn.mean) : none(bn.mean), dz_xhat = sums ? at::zeros_like(bn.mean) : none(bn.mean);
  // Where the dtype holds it without rounding, dz, which takes an exponential, waits in dx for the last pass.
  const bool wide = dtype == DType::f32 || dtype == DType::f64;
  const bool keeps = wanted[0] && sums && wide && activation.is_smooth();
  if (some && sums)
    cpu_kernels(x).bn_act_backward_reduce(keeps ? dx.data_ptr() : nullptr, dz.data_ptr(), dz_xhat.data_ptr(),
                                          dout.const_data_ptr(), x.const_data_ptr(), dtype, view, bn.kernel,
                                          activation);
  if (some && wanted[0])
    cpu_kernels(x).bn_act_backward_apply(dx.data_ptr(), keeps ? dx.const_data_ptr() : dout.const_data_ptr(),
                                         x.const_data_ptr(), batch_stats ? dz.data_ptr() : nullptr,
                                         batch_stats ? dz_xhat.data_ptr() : nullptr, double(view.count()), dtype, view,
                                         bn.kernel, keeps ? Activation{Activation::none, 0, 0} : activation);
  return {dx, wanted[1] ? dz_xhat : none(bn.mean), wanted[2] ? dz : none(bn.mean)};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& x, const OptTensor& weight,
                                                   const OptTensor& bias, const Tensor& mean, const Tensor& var,
                                                   double eps, bool batch_stats, c10::string_view act, double a,
                                                   double b, std::array<bool, 3> wanted) {
  return bn_act_gradients(dout, x, weight, bias, mean, var, eps, batch_stats, act, a, b, wanted, /*spent=*/false);
}

// act(bn(x)) of ATen's ops, for derivatives of derivatives.
Tensor bn_act_decomposed(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                         const Tensor& var, double eps, bool batch_stats, const Activation& act) {
  const OptTensor given_mean = batch_stats ? OptTensor() : OptTensor(mean.contiguous());
  const OptTensor given_var = batch_stats ? OptTensor() : OptTensor(var.contiguous());
  const OptTensor dense_weight = weight.defined() ? OptTensor(weight.contiguous()) : OptTensor();
  const Tensor z = at::batch_norm(x, dense_weight, bias, given_mean, given_var, batch_stats, 0.0, eps, false);
  switch (act.kind) {
    case Activation::relu:
      return at::relu(z);
    case Activation::leaky_relu:
      return at::leaky_relu(z, act.a);
    case Activation::hardtanh:
      return at::hardtanh(z, act.a, act.b);
    case Activation::hardswish:
      return at::hardswish(z);
    case Activation::silu:
      return at::silu(z);
    case Activation::gelu:
      return at::gelu(z);
    case Activation::gelu_tanh:
      return at::gelu(z, "tanh");
    default:
      return z;
  }
}

// A convolution of the value.
struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  std::optional<int64_t> paths;

  Tensor forward(const Tensor& value, const Tensor& weight, const OptTensor& bias) const {
    if (!paths) return at::conv2d(value, weight, bias, stride, padding, dilation, groups);
    const Convolution conv{stride, padding, asked_of(kBnAct, *paths)};
    check_convolution(kBnAct, value, weight, conv);
    check_bias(kBnAct, bias, weight);
    return conv_forward(value, weight, bias, conv);
  }

  // Of the value, the weight and the bias, where `wanted`.
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& value, const Tensor& weight,
                                              const std::array<bool, 3>& wanted) const {
    if (!paths)
      return at::convolution_backward(dout, value, weight, at::IntArrayRef(weight.size(0)), stride, padding, dilation,
                                      false, {0, 0}, groups, wanted);
    const Convolution conv{stride, padding, asked_of(kBnAct, *paths)};
    check_as(kBnAct, "dout", dout, conv.out_sizes(value, weight), value);
    const ConvGradients g = conv_backward(dout, value, weight, conv, wanted);
    return {g.dx, g.dweight, g.dbias};
  }
};

// A normalisation and its activation, as backward keeps them.
struct Recipe {
  Tensor x, bn_weight, bn_bias, mean, var;  // weight and bias may be undefined
  bool batch_stats;
  double eps;
  std::string act;
  double a, b;

  // Behind these, `more` is saved too.
  void save(AutogradContext* ctx, variable_list more = {}) const {
    more.insert(more.begin(), {x, bn_weight, bn_bias, mean, var});
    ctx->save_for_backward(more);
    auto& kept = ctx->saved_data;
    kept["batch_stats"] = batch_stats;
    kept["eps"] = eps;
    kept["act"] = act;
    kept["a"] = a;
    kept["b"] = b;
  }
  static Recipe of(AutogradContext* ctx, const variable_list& saved) {
    auto& kept = ctx->saved_data;
    return {saved[0],
            saved[1],
            saved[2],
            saved[3],
            saved[4],
            kept["batch_stats"].toBool(),
            kept["eps"].toDouble(),
            kept["act"].toStringRef(),
            kept["a"].toDouble(),
            kept["b"].toDouble()};
  }
  Tensor value() const { return bn_act(x, bn_weight, bn_bias, mean, var, eps, act, a, b); }
  // Of ATen's ops, and so differentiable, also in the statistics.
  Tensor decomposed(const Tensor& x, const Tensor& bn_weight, const Tensor& bn_bias) const {
    return bn_act_decomposed(x, bn_weight, bn_bias, mean, var, eps, batch_stats, activation_of(act, a, b));
  }
};

bool needed(const Tensor& t) { return t.defined() && t.requires_grad(); }

// The value, of which backward keeps the raw input.
struct BnActFunction : torch::autograd::Function<BnActFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias,
                        const Tensor& mean, const Tensor& var, bool batch_stats, double eps, const std::string& act,
                        double a, double b) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Recipe recipe{
        x, bn_weight.value_or(Tensor()), bn_bias.value_or(Tensor()), mean, var, batch_stats, eps, act, a, b};
    recipe.save(ctx);
    return recipe.value();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    if (!grads[0].defined()) return result;
    const Recipe r = Recipe::of(ctx, ctx->get_saved_variables());
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) { return r.decomposed(t[0], t[1], t[2]); };
      const variable_list found = differentiate(again, {r.x, r.bn_weight, r.bn_bias}, grads[0]);
      std::copy(found.begin(), found.end(), result.begin());
      return result;
    }
    const std::array<bool, 3> wanted{needed(r.x), needed(r.bn_weight), needed(r.bn_bias)};
    // Nobody else holds the gradient: its memory may take dx.
    const bool spent = grads[0].use_count() == 1 && grads[0].storage().use_count() == 1;
    auto [dx, dbn_weight, dbn_bias] = bn_act_gradients(grads[0], r.x, r.bn_weight, r.bn_bias, r.mean, r.var, r.eps,
                                                       r.batch_stats, r.act, r.a, r.b, wanted, spent);
    if (wanted[0]) result[0] = dx;
    if (wanted[1]) result[1] = dbn_weight.to(r.bn_weight.scalar_type());
    if (wanted[2]) result[2] = dbn_bias.to(r.bn_bias.scalar_type());
    return result;
  }
};

// A convolution of the value, which is not kept: backward makes it again of the raw input.
struct BnActConvFunction : torch::autograd::Function<BnActConvFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& value, const Recipe& recipe, const Tensor& weight,
                        const OptTensor& bias, const Geometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    recipe.save(ctx, {weight, bias.value_or(Tensor())});
    auto& kept = ctx->saved_data;
    kept["of_value"] = value.requires_grad();
    kept["stride"] = geometry.stride;
    kept["padding"] = geometry.padding;
    kept["dilation"] = geometry.dilation;
    kept["groups"] = geometry.groups;
    kept["paths"] = geometry.paths;
    return geometry.forward(value, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Recipe recipe = Recipe::of(ctx, saved);
    const Tensor &weight = saved[5], &bias = saved[6];
    auto& kept = ctx->saved_data;
    const Geometry geometry{kept["stride"].toIntVector(), kept["padding"].toIntVector(), kept["dilation"].toIntVector(),
                            kept["groups"].toInt(), kept["paths"].toOptional<int64_t>()};
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) {
        return at::conv2d(t[0], t[1], t[2], geometry.stride, geometry.padding, geometry.dilation, geometry.groups);
      };
      const Tensor value = recipe.decomposed(recipe.x, recipe.bn_weight, recipe.bn_bias);
      const variable_list found = differentiate(again, {value, weight, bias}, grads[0]);
      result[0] = found[0], result[2] = found[1], result[3] = found[2];
      return result;
    }
    const std::array<bool, 3> wanted{kept["of_value"].toBool(), needed(weight), needed(bias)};
    auto [dvalue, dweight, dbias] = geometry.backward(grads[0], recipe.value(), weight, wanted);
    if (wanted[0]) result[0] = dvalue;
    if (wanted[1]) result[2] = dweight;
    if (wanted[2]) result[3] = dbias;
    return result;
  }
};

}  // namespace

Tensor bn_act_recomputed(const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias, const Tensor& mean,
                         const Tensor& var, bool batch_stats, double eps, const std::string& act, double a, double b) {
  return BnActFunction::apply(x, bn_weight, bn_bias, mean, var, batch_stats, eps, act, a, b);
}

Tensor bn_act_conv2d(const Tensor& value, const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias,
                     const Tensor& mean, const Tensor& var, bool batch_stats, double eps, const std::string& act,
                     double a, double b, const Tensor& weight, const OptTensor& bias,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, int64_t groups, std::optional<int64_t> paths) {
  const Recipe recipe{x, bn_weight.value_or(Tensor()), bn_bias.value_or(Tensor()), mean, var, batch_stats, eps, act, a,
                      b};
  return BnActConvFunction::apply(value, recipe, weight, bias, Geometry{stride, padding, dilation, groups, paths});
}

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
