// conv2d(relu(batch_norm(x))) + residual as an op of torch: schema, derivative, autocast. Backward computes the
// activation again from x, so only x is kept.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../batch_norm/decomposed.h"
#include "../common/autograd.h"
#include "../conv/bn_relu_conv.h"
#include "../conv/library.h"

namespace ran {
namespace {

using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

// out; mean and biased variance of x, empty where they were given; those of out, empty where `next_stats` is false; and
// x again, where autograd is to `fork`: the gradient of that output is added in the launch that writes dx. Below
// autograd it is empty.
Tensors6 chained(const Tensor& x_, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
                 const OptTensor& var, bool, at::TensorList running, std::optional<double> momentum, double eps,
                 const Tensor& weight, const OptTensor& bias, const OptTensor& residual, at::IntArrayRef stride,
                 at::IntArrayRef padding, bool next_stats, at::TensorList next_running,
                 std::optional<double> next_momentum, bool, int64_t paths) {
  const Tensor x = dense_activation(kBnReluConv2d, x_);
  const Convolution conv{stride, padding, asked_of(kBnReluConv2d, paths)};
  check_convolution(kBnReluConv2d, x, weight, conv);
  check_bias(kBnReluConv2d, bias, weight);
  check_statistics(kBnReluConv2d, mean, var);
  if (present(residual)) check_as(kBnReluConv2d, "residual", *residual, conv.out_sizes(x, weight), x);
  // The next normalisation's channels are the weight's rows.
  const NextStatistics next{next_stats, Running(kBnReluConv2d, weight.transpose(0, 1), next_running, next_momentum)};
  const ConvOutput y =
      bn_relu_conv_forward(x, {bn_weight, bn_bias, mean, var, Running(kBnReluConv2d, x, running, momentum), eps},
                           weight, bias, residual, conv, next);
  const auto or_empty = [&](const Tensor& t) {
    return t.defined() ? t : at::empty({0}, x.options().dtype(acc_type(x)));
  };
  return {y.out,
          or_empty(y.mean),
          or_empty(y.var),
          or_empty(y.next_mean),
          or_empty(y.next_var),
          at::empty({0}, x.options())};
}

// dx with `dfork` added, dbn_weight, dbn_bias, dweight, dbias; `wanted` says which of (dx and BN's, dweight, dbias) to
// compute, the others are empty.
GradientTensors bn_relu_conv2d_backward(const Tensor& dout, const Tensor& x_, const OptTensor& bn_weight,
                                        const OptTensor& bn_bias, const Tensor& mean, const Tensor& var,
                                        const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                                        double eps, bool batch_stats, std::array<bool, 3> wanted,
                                        const OptTensor& dfork, int64_t paths) {
  const Tensor x = dense_activation(kBnReluConv2d, x_);
  const Convolution conv{stride, padding, asked_of(kBnReluConv2d, paths)};
  check_convolution(kBnReluConv2d, x, weight, conv);
  check_as(kBnReluConv2d, "dout", dout, conv.out_sizes(x, weight), x);
  const ConvGradients g =
      bn_relu_conv_backward(dout, x, present(dfork) ? gradient_like(kBnReluConv2d, *dfork, x) : Tensor(),
                            {kBnReluConv2d, x, bn_weight, bn_bias, mean, var, eps}, batch_stats, weight, conv, wanted);
  return tensors_of(g, x);
}

// The statistics' arguments on their way through autograd, which differentiates nothing in them.
struct Statistics {
  bool batch_stats;
  Kept running;
  bool next_stats;
  Kept next_running;
  bool fork;
};

struct ChainedFunction : torch::autograd::Function<ChainedFunction> {
  // The places of forward's differentiable arguments among all of its arguments, and so among backward's results.
  enum Place { kX = 0, kBnWeight = 1, kBnBias = 2, kWeight = 7, kBias = 8, kResidual = 9, kPlaces = 13 };

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& bn_weight,
                               const OptTensor& bn_bias, const OptTensor& mean, const OptTensor& var,
                               const Statistics& stats, double eps, const Tensor& weight, const OptTensor& bias,
                               const OptTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                               int64_t paths) {
    static const auto op = find_op<decltype(chained)>("ran_ext::_chained_bn_relu_conv2d");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, batch_mean, batch_var, next_mean, next_var, none] =
        op.call(x, bn_weight, bn_bias, mean, var, stats.batch_stats, stats.running.tensors, stats.running.momentum, eps,
                weight, bias, residual, stride, padding, stats.next_stats, stats.next_running.tensors,
                stats.next_running.momentum, stats.fork, paths);
    stats.running.mark_changed();
    stats.next_running.mark_changed();
    const bool given = present(mean);
    ctx->save_for_backward({x, bn_weight.value_or(Tensor()), bn_bias.value_or(Tensor()), given ? *mean : batch_mean,
                            given ? *var : batch_var, weight, bias.value_or(Tensor())});
    ctx->saved_data["batch_stats"] = !given || stats.batch_stats;
    ctx->saved_data["has_residual"] = present(residual);
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["paths"] = paths;
    variable_list flat{batch_mean, batch_var, next_mean, next_var};
    if (!stats.fork) flat.push_back(none);
    ctx->mark_non_differentiable(flat);
    ctx->set_materialize_grads(false);  // out or identity may lead nowhere
    return {out, batch_mean, batch_var, next_mean, next_var, stats.fork ? x : none};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<decltype(bn_relu_conv2d_backward)>("ran_ext::bn_relu_conv2d_backward");
    variable_list result(kPlaces);
    const Tensor& dfork = grads[5];
    if (!grads[0].defined()) {
      result[kX] = dfork;
      return result;
    }
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &bn_weight = saved[1], &bn_bias = saved[2], &weight = saved[5], &bias = saved[6];
    const auto stride = ctx->saved_data["stride"].toIntVector(), padding = ctx->saved_data["padding"].toIntVector();
    const bool batch_stats = ctx->saved_data["batch_stats"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    if (ctx->saved_data["has_residual"].toBool()) result[kResidual] = grads[0];
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) {
        const Tensor a = decomposed::bn_relu(t[0], t[1], t[2], saved[3], saved[4], batch_stats, eps);
        return library::conv2d(a, t[3], t[4], stride, padding);
      };
      const variable_list found = differentiate(again, {x, bn_weight, bn_bias, weight, bias}, grads[0]);
      std::copy_n(found.begin(), 3, result.begin() + kX);
      std::copy_n(found.begin() + 3, 2, result.begin() + kWeight);
      if (dfork.defined()) result[kX] = result[kX].defined() ? result[kX] + dfork : dfork;
      return result;
    }
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0) || ctx->needs_input_grad(1) || ctx->needs_input_grad(2),
                                     weight.requires_grad(), bias.defined() && bias.requires_grad()};
    auto [dx, dbn_weight, dbn_bias, dweight, dbias] =
        op.call(grads[0], x, bn_weight, bn_bias, saved[3], saved[4], weight, stride, padding, eps, batch_stats, wanted,
                dfork.defined() ? OptTensor(dfork) : std::nullopt, ctx->saved_data["paths"].toInt());
    if (wanted[0]) {
      result[kX] = dx;
      if (bn_weight.defined()) result[kBnWeight] = dbn_weight.to(bn_weight.scalar_type());
      if (bn_bias.defined()) result[kBnBias] = dbn_bias.to(bn_bias.scalar_type());
    }
    if (wanted[1]) result[kWeight] = dweight;
    if (wanted[2]) result[kBias] = dbias;
    return result;
  }
};

Tensors6 chained_autograd(const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
                          const OptTensor& var, bool batch_stats, at::TensorList running,
                          std::optional<double> momentum, double eps, const Tensor& weight, const OptTensor& bias,
                          const OptTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, bool next_stats,
                          at::TensorList next_running, std::optional<double> next_momentum, bool fork, int64_t paths) {
  const Statistics stats{batch_stats, {running, momentum}, next_stats, {next_running, next_momentum}, fork};
  const variable_list out = ChainedFunction::apply(x, bn_weight, bn_bias, mean, var, stats, eps, weight, bias, residual,
                                                   stride, padding, paths);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

// Autocast as eager PyTorch's: the convolution in the lower precision, batch normalisation's vectors as they are. Where
// x itself is wider (a network's first layer) it is normalised in that precision and rounded once, after the ReLU;
// where the residual is wider the sum is. The next statistics are then taken from what comes out.
template <at::DeviceType device>
Tensors6 chained_autocast(const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
                          const OptTensor& var, bool batch_stats, at::TensorList running,
                          std::optional<double> momentum, double eps, const Tensor& weight, const OptTensor& bias,
                          const OptTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, bool next_stats,
                          at::TensorList next_running, std::optional<double> next_momentum, bool fork, int64_t paths) {
  static const auto op = find_op<decltype(chained)>("ran_ext::_chained_bn_relu_conv2d");
  const at::ScalarType lower = at::autocast::get_autocast_dtype(device);
  const bool wide_x = x.scalar_type() != lower && x.scalar_type() != at::kDouble;
  const auto cast = [&](const Tensor& t) {
    return at::autocast::cached_cast(wide_x ? lower : x.scalar_type(), t, device);
  };
  const bool wide_residual = present(residual) && residual->scalar_type() != x.scalar_type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const OptTensor bias_cast = present(bias) ? OptTensor(cast(*bias)) : bias;
  if (!wide_x && !wide_residual)
    return op.call(x, bn_weight, bn_bias, mean, var, batch_stats, running, momentum, eps, cast(weight), bias_cast,
                   residual, stride, padding, next_stats, next_running, next_momentum, fork, paths);
  Tensor out, batch_mean, batch_var, next_mean, next_var, identity = x;
  if (wide_x) {
    static const auto norm = find_op<BnReluOp>("ran_ext::bn_relu");
    Tensor a;
    std::tie(a, batch_mean, batch_var) =
        norm.call(x, bn_weight, bn_bias, mean, var, batch_stats, running, momentum, eps, paths);
    out = library::conv2d(cast(a), cast(weight), bias_cast, stride, padding);
  } else {
    std::tie(out, batch_mean, batch_var, next_mean, next_var, identity) =
        op.call(x, bn_weight, bn_bias, mean, var, batch_stats, running, momentum, eps, cast(weight), bias_cast,
                std::nullopt, stride, padding, false, {}, std::nullopt, fork, paths);
  }
  if (present(residual)) out = out + *residual;
  static const auto take = find_op<BatchNormStatsOp>("ran_ext::batch_norm_stats");
  if (next_stats)
    std::tie(next_mean, next_var) = take.call(out, next_running, next_momentum);
  else if (!next_mean.defined())
    next_mean = at::empty({0}, batch_mean.options()), next_var = at::empty({0}, batch_mean.options());
  return {out, batch_mean, batch_var, next_mean, next_var, identity};
}

// The op by itself, its options named. It is made of the chained one: autograd, autocast and tracers see that.
Tensors3 bn_relu_conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, at::TensorList running,
                        const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
                        const OptTensor& var, bool batch_stats, std::optional<double> momentum, double eps,
                        const OptTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, int64_t paths) {
  static const auto op = find_op<decltype(chained)>("ran_ext::_chained_bn_relu_conv2d");
  const auto result = op.call(x, bn_weight, bn_bias, mean, var, batch_stats, running, momentum, eps, weight, bias,
                              residual, stride, padding, false, {}, std::nullopt, false, paths);
  return {std::get<0>(result), std::get<1>(result), std::get<2>(result)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def(
      "bn_relu_conv2d(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor(a!)[] running, Tensor? bn_weight=None, "
      "Tensor? bn_bias=None, Tensor? mean=None, Tensor? var=None, bool batch_stats=False, float? momentum=None, "
      "float eps=1e-05, Tensor? residual=None, int[2] stride=1, int[2] padding=0, int paths=0) -> "
      "(Tensor out, Tensor mean, Tensor var)",
      bn_relu_conv2d);
  m.def(
      "_chained_bn_relu_conv2d(Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var, bool "
      "batch_stats, "
      "Tensor(a!)[] running, float? momentum, float eps, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, "
      "int[2] padding, bool next_stats, Tensor(b!)[] next_running, float? next_momentum, bool fork, int paths=0) -> "
      "(Tensor out, Tensor mean, Tensor var, Tensor next_mean, Tensor next_var, Tensor identity)");
  m.def(
      "bn_relu_conv2d_backward(Tensor dout, Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor var, "
      "Tensor weight, int[2] stride, int[2] padding, float eps, bool batch_stats, bool[3] wanted, Tensor? dfork, "
      "int paths=0) -> "
      "(Tensor dx, Tensor dbn_weight, Tensor dbn_bias, Tensor dweight, Tensor dbias)");
}
RAN_KERNELS(m) {
  m.impl("_chained_bn_relu_conv2d", chained);
  m.impl("bn_relu_conv2d_backward", bn_relu_conv2d_backward);
}
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("_chained_bn_relu_conv2d", chained_autograd); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCPU, m) { m.impl("_chained_bn_relu_conv2d", chained_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCUDA, m) { m.impl("_chained_bn_relu_conv2d", chained_autocast<at::kCUDA>); }

}  // namespace ran
