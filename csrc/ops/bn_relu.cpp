// Batch normalisation + ReLU as ops of torch: schema, derivative.
#include "../batch_norm/bn_relu.h"

#include <torch/library.h>

#include "../batch_norm/decomposed.h"
#include "../common/autograd.h"

namespace ran {
namespace {

using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> batch_norm_stats_op(const Tensor& x_, at::TensorList running,
                                               std::optional<double> momentum) {
  const Tensor x = dense_activation("batch_norm_stats", x_);
  return batch_norm_stats(x, Running("batch_norm_stats", x, running, momentum));
}

// out, and the batch's mean and biased variance; those two are empty where the statistics were given. `batch_stats`
// says of given ones whether they are the batch's own, which the derivative must know.
Tensors3 bn_relu(const Tensor& x_, const OptTensor& weight, const OptTensor& bias, const OptTensor& mean,
                 const OptTensor& var, bool, at::TensorList running, std::optional<double> momentum, double eps,
                 int64_t paths) {
  const Tensor x = dense_activation(kBnRelu, x_);
  check_statistics(kBnRelu, mean, var);
  const Asked asked = asked_of(kBnRelu, paths);
  if (!present(mean))
    return bn_relu_batch(kBnRelu, x, weight, bias, eps, Running(kBnRelu, x, running, momentum), asked);
  const auto none = [&] { return at::empty({0}, x.options().dtype(acc_type(x))); };
  return {bn_relu_apply(x, {kBnRelu, x, weight, bias, *mean, *var, eps}), none(), none()};
}

Tensors3 bn_relu_backward(const Tensor& dout_, const Tensor& x_, const OptTensor& weight, const OptTensor& bias,
                          const Tensor& mean, const Tensor& var, double eps, bool batch_stats, int64_t paths) {
  const Tensor x = dense_activation(kBnRelu, x_), dout = gradient_like(kBnRelu, dout_, x);
  Tensor dx = at::empty_like(x);
  const BackwardSums sums = bn_relu_gradients(dx, dout, x, Tensor(), {kBnRelu, x, weight, bias, mean, var, eps},
                                              batch_stats, asked_of(kBnRelu, paths));
  return {dx, sums.dz_xhat, sums.dz};
}

// The two halves of bn_relu_backward, between which synchronised batch normalisation adds up the processes' sums.
std::tuple<Tensor, Tensor> bn_relu_backward_reduce(const Tensor& dout, const Tensor& x_, const OptTensor& weight,
                                                   const OptTensor& bias, const Tensor& mean, const Tensor& var,
                                                   double eps) {
  const Tensor x = dense_activation(kBnRelu, x_);
  const BackwardSums sums =
      bn_relu_sums(gradient_like(kBnRelu, dout, x), x, {kBnRelu, x, weight, bias, mean, var, eps});
  return {sums.dz, sums.dz_xhat};
}

Tensor bn_relu_backward_apply(const Tensor& dout, const Tensor& x_, const OptTensor& weight, const OptTensor& bias,
                              const Tensor& mean, const Tensor& var, double eps, const Tensor& sum_dz,
                              const Tensor& sum_dz_xhat, double count) {
  const Tensor x = dense_activation(kBnRelu, x_);
  const BackwardSums sums{channel_vector(kBnRelu, x, sum_dz, "sum_dz"),
                          channel_vector(kBnRelu, x, sum_dz_xhat, "sum_dz_xhat")};
  Tensor dx = at::empty_like(x);
  bn_relu_dx(dx, gradient_like(kBnRelu, dout, x), x, Tensor(), {kBnRelu, x, weight, bias, mean, var, eps}, &sums,
             count);
  return dx;
}

struct BnReluFunction : torch::autograd::Function<BnReluFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                               const OptTensor& mean, const OptTensor& var, bool batch_stats, const Kept& running,
                               double eps, int64_t paths) {
    static const auto op = find_op<BnReluOp>("ran_ext::bn_relu");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, batch_mean, batch_var] =
        op.call(x, weight, bias, mean, var, batch_stats, running.tensors, running.momentum, eps, paths);
    running.mark_changed();
    const bool given = present(mean);
    ctx->save_for_backward(
        {x, weight.value_or(Tensor()), bias.value_or(Tensor()), given ? *mean : batch_mean, given ? *var : batch_var});
    ctx->saved_data["batch_stats"] = !given || batch_stats;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["paths"] = paths;
    ctx->mark_non_differentiable({batch_mean, batch_var});
    return {out, batch_mean, batch_var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<decltype(bn_relu_backward)>("ran_ext::bn_relu_backward");
    variable_list result(9);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const bool batch_stats = ctx->saved_data["batch_stats"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &var = saved[4];
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) {
        return decomposed::bn_relu(t[0], t[1], t[2], mean, var, batch_stats, eps);
      };
      const variable_list found = differentiate(again, {x, weight, bias}, grads[0]);
      std::copy(found.begin(), found.end(), result.begin());
      return result;
    }
    auto [dx, dweight, dbias] =
        op.call(grads[0], x, weight, bias, mean, var, eps, batch_stats, ctx->saved_data["paths"].toInt());
    result[0] = dx;
    if (weight.defined()) result[1] = dweight.to(weight.scalar_type());
    if (bias.defined()) result[2] = dbias.to(bias.scalar_type());
    return result;
  }
};

Tensors3 bn_relu_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& mean,
                          const OptTensor& var, bool batch_stats, at::TensorList running,
                          std::optional<double> momentum, double eps, int64_t paths) {
  const variable_list out =
      BnReluFunction::apply(x, weight, bias, mean, var, batch_stats, Kept{running, momentum}, eps, paths);
  return {out[0], out[1], out[2]};
}

// No gradient passes through the statistics: the op that normalises with them has the whole derivative.
std::tuple<Tensor, Tensor> batch_norm_stats_autograd(const Tensor& x, at::TensorList running,
                                                     std::optional<double> momentum) {
  static const auto op = find_op<BatchNormStatsOp>("ran_ext::batch_norm_stats");
  at::AutoDispatchBelowADInplaceOrView below;
  auto found = op.call(x, running, momentum);
  Kept{running, momentum}.mark_changed();
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("batch_norm_stats(Tensor x, Tensor(a!)[] running, float? momentum) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, bool batch_stats, Tensor(a!)[] "
      "running, float? momentum, float eps, int paths=0) -> (Tensor out, Tensor mean, Tensor var)");
  m.def(
      "bn_relu_backward(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
      "bool batch_stats, int paths=0) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "bn_relu_backward_reduce(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float "
      "eps) -> "
      "(Tensor sum_dz, Tensor sum_dz_xhat)");
  m.def(
      "bn_relu_backward_apply(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
      "Tensor sum_dz, Tensor sum_dz_xhat, float count) -> Tensor");
}
RAN_KERNELS(m) {
  m.impl("batch_norm_stats", batch_norm_stats_op);
  m.impl("bn_relu", bn_relu);
  m.impl("bn_relu_backward", bn_relu_backward);
  m.impl("bn_relu_backward_reduce", bn_relu_backward_reduce);
  m.impl("bn_relu_backward_apply", bn_relu_backward_apply);
}
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) {
  m.impl("batch_norm_stats", batch_norm_stats_autograd);
  m.impl("bn_relu", bn_relu_autograd);
}

}  // namespace ran
