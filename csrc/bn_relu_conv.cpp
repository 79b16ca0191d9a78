// Torch side of conv2d(relu(batch_norm(x))) + residual: fused where a kernel takes the shape, else one fused BN-ReLU
// pass before ATen's convolution. Backward computes the activation again from x, so only x is kept.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd.h"
#include "bn_relu.h"
#include "composed.h"
#include "cuda_conv1x1.h"

namespace ran {
namespace {

constexpr const char* kOp = "bn_relu_conv2d";

using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Convolution {
  at::IntArrayRef stride, padding;

  int64_t out_size(const Tensor& x, const Tensor& weight, int i) const {
    return (x.size(2 + i) + 2 * padding[i] - weight.size(2 + i)) / stride[i] + 1;
  }
};

void check(const Tensor& x, const Tensor& weight, const Convolution& conv) {
  RAN_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1), kOp, "weight must be (C_out, ", x.size(1),
                  ", kH, kW), got ", weight.sizes());
  RAN_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), kOp, "weight must have x's dtype ", x.scalar_type(), ", got ",
                 weight.scalar_type());
  RAN_CHECK_VALUE(conv.stride.size() == 2 && conv.padding.size() == 2, kOp, "stride and padding must be pairs");
}

// The convolution for this library's own matrix products, where the CPU has them for it.
std::optional<cpu::ConvShape> native_shape(const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return std::nullopt;
  const cpu::ConvShape shape{x.size(0),
                             x.size(2),
                             x.size(3),
                             x.size(1),
                             conv.out_size(x, weight, 0),
                             conv.out_size(x, weight, 1),
                             weight.size(0),
                             weight.size(2),
                             weight.size(3),
                             conv.stride[0],
                             conv.stride[1],
                             conv.padding[0],
                             conv.padding[1]};
  if (!kernels_of(x)->conv_supported(dtype_of(x, kOp, "x"), shape)) return std::nullopt;
  return shape;
}

std::optional<cpu::ConvShape> native_pointwise(const Tensor& x, const Tensor& weight, const Convolution& conv) {
  const auto shape = native_shape(x, weight, conv);
  return shape && shape->is_pointwise() ? shape : std::nullopt;
}

Tensor forward(const Tensor& x, const BatchNormArgs& bn, const Tensor& weight_, const OptTensor& bias,
               const OptTensor& residual, const Convolution& conv) {
#ifdef RAN_WITH_CUDA
  if (use_cuda_conv1x1(ConvPass::forward, x, weight_, conv.stride, conv.padding))
    return cuda_conv1x1_forward(x, bn, weight_, bias, residual);
#endif
  if (const auto shape = native_pointwise(x, weight_, conv)) {
    const Tensor weight = weight_.contiguous();
    Tensor out = at::empty({x.size(0), shape->co, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
    const Tensor bias32 = present(bias) ? bias->to(at::kFloat).contiguous() : Tensor();
    const Tensor added = present(residual) ? gradient_like(kOp, *residual, out) : Tensor();
    kernels_of(x)->conv1x1_forward(out.data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                   bias32.defined() ? bias32.const_data_ptr<float>() : nullptr,
                                   added.defined() ? added.const_data_ptr() : nullptr, dtype_of(x, kOp, "x"), *shape,
                                   bn.kernel);
    return out;
  }
  Tensor out = at::conv2d(bn_relu_apply(x, bn), weight_, bias, conv.stride, conv.padding);
  return present(residual) ? out.add_(*residual) : out;
}

Tensors3 bn_relu_conv2d(const Tensor& x_, const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& mean,
                        const OptTensor& var, const Tensor& weight, const OptTensor& bias, const OptTensor& residual,
                        at::IntArrayRef stride, at::IntArrayRef padding, double eps) {
  const Tensor x = dense_activation(kOp, x_);
  const Convolution conv{stride, padding};
  check(x, weight, conv);
  if (present(mean)) {
    const auto options = x.options().dtype(acc_type(x));
    const BatchNormArgs bn(kOp, x, bn_weight, bn_bias, *mean, *var, eps);
    return {forward(x, bn, weight, bias, residual, conv), at::empty({0}, options), at::empty({0}, options)};
  }
  auto [batch_mean, batch_var] = batch_norm_stats(x);
  const BatchNormArgs bn(kOp, x, bn_weight, bn_bias, batch_mean, batch_var, eps);
  return {forward(x, bn, weight, bias, residual, conv), batch_mean, batch_var};
}

// The gradients of the convolution of relu(bn(x)): dz (x's own, masked by the ReLU) with its sums, dweight and dbias.
struct ConvGradients {
  Tensor dz, dweight, dbias;
  BackwardSums sums;
};

void native_weight_gradient(ConvGradients& out, const Tensor& dy, const Tensor& x, const BatchNormArgs& bn,
                            const Tensor& weight, const cpu::ConvShape& shape, bool want_bias) {
  out.dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({shape.co}, bn.mean.options()) : Tensor();
  // A larger kernel reads each activation many times: it is written out once rather than computed again for every tap.
  const Tensor a = shape.taps() == 1 ? x : bn_relu_apply(x, bn);
  kernels_of(x)->conv_weight_gradient(out.dweight.data_ptr(), want_bias ? dbias.data_ptr<float>() : nullptr,
                                      dy.const_data_ptr(), a.const_data_ptr(), dtype_of(x, kOp, "x"), shape,
                                      shape.taps() == 1 ? &bn.kernel : nullptr);
  if (want_bias) out.dbias = dbias.to(x.scalar_type());
}

ConvGradients conv_gradients(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn, const Tensor& weight,
                             const Convolution& conv, std::array<bool, 3> wanted) {
  ConvGradients out;
  const auto shape = native_shape(x, weight, conv);
  const Tensor dy = shape ? dout.contiguous(at::MemoryFormat::ChannelsLast) : dout;
  if (shape && wanted[1]) {
    native_weight_gradient(out, dy, x, bn, weight, *shape, wanted[2]);
    wanted[1] = wanted[2] = false;
  }
  if (shape && shape->is_pointwise() && wanted[0]) {
    const Tensor w = weight.contiguous();
    out.dz = at::empty_like(x);
    out.sums = {at::empty_like(bn.mean), at::empty_like(bn.mean)};
    kernels_of(x)->conv1x1_data_gradient(out.dz.data_ptr(), out.sums.dz.data_ptr<float>(),
                                         out.sums.dz_xhat.data_ptr<float>(), dy.const_data_ptr(), x.const_data_ptr(),
                                         w.const_data_ptr(), dtype_of(x, kOp, "x"), *shape, bn.kernel);
    wanted[0] = false;
  }
#ifdef RAN_WITH_CUDA
  if (wanted[1] && use_cuda_conv1x1(ConvPass::wgrad, x, weight, conv.stride, conv.padding)) {
    std::tie(out.dweight, out.dbias) = cuda_conv1x1_wgrad(dout, x, bn, weight, wanted[2]);
    wanted[1] = wanted[2] = false;
  }
  if (wanted[0] && use_cuda_conv1x1(ConvPass::dgrad, x, weight, conv.stride, conv.padding)) {
    std::tie(out.dz, out.sums) = cuda_conv1x1_dgrad(dout, x, bn, weight);
    wanted[0] = false;
  }
#endif
  if (!wanted[0] && !wanted[1] && !wanted[2]) return out;
  const Tensor a = wanted[1] ? bn_relu_apply(x, bn) : x;  // the data gradient needs its shape only
  auto [da, dweight, dbias] = at::convolution_backward(dy, a, weight, at::IntArrayRef(weight.size(0)), conv.stride,
                                                       conv.padding, {1, 1}, false, {0, 0}, 1, wanted);
  if (wanted[0]) {
    out.dz = da.contiguous(format_of(x));
    out.sums = bn_relu_sums(out.dz, x, bn);
  }
  if (wanted[1]) out.dweight = dweight;
  if (wanted[2]) out.dbias = dbias;
  return out;
}

// dx, dbn_weight, dbn_bias, dweight, dbias; `wanted` says which of (dx and BN's, dweight, dbias) to compute, the others
// are empty.
Tensors5 bn_relu_conv2d_backward(const Tensor& dout, const Tensor& x_, const OptTensor& bn_weight,
                                 const OptTensor& bn_bias, const Tensor& mean, const Tensor& var, const Tensor& weight,
                                 at::IntArrayRef stride, at::IntArrayRef padding, double eps, bool batch_stats,
                                 std::array<bool, 3> wanted) {
  const Tensor x = dense_activation(kOp, x_);
  const Convolution conv{stride, padding};
  check(x, weight, conv);
  const std::array<int64_t, 4> out_sizes{x.size(0), weight.size(0), conv.out_size(x, weight, 0),
                                         conv.out_size(x, weight, 1)};
  RAN_CHECK_VALUE(dout.sizes() == at::IntArrayRef(out_sizes) && dout.scalar_type() == x.scalar_type(), kOp,
                  "dout must be ", at::IntArrayRef(out_sizes), " ", x.scalar_type(), ", got ", dout.sizes(), " ",
                  dout.scalar_type());
  const BatchNormArgs bn(kOp, x, bn_weight, bn_bias, mean, var, eps);
  ConvGradients g = conv_gradients(dout, x, bn, weight, conv, wanted);
  Tensor dx;
  if (wanted[0]) {
    dx = x.is_cuda() ? at::empty_like(x) : g.dz;
    bn_relu_dx(dx, g.dz, x, bn, batch_stats ? &g.sums : nullptr, double(view_of(x).count()));
  }
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, x.options()); };
  return {or_empty(dx), or_empty(g.sums.dz_xhat), or_empty(g.sums.dz), or_empty(g.dweight), or_empty(g.dbias)};
}

struct BnReluConvFunction : torch::autograd::Function<BnReluConvFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& bn_weight,
                               const OptTensor& bn_bias, const OptTensor& mean, const OptTensor& var,
                               const Tensor& weight, const OptTensor& bias, const OptTensor& residual,
                               at::IntArrayRef stride, at::IntArrayRef padding, double eps) {
    static const auto op =
        find_op<Tensors3(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                         const Tensor&, const OptTensor&, const OptTensor&, at::IntArrayRef, at::IntArrayRef, double)>(
            "ran_ext::bn_relu_conv2d");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, batch_mean, batch_var] =
        op.call(x, bn_weight, bn_bias, mean, var, weight, bias, residual, stride, padding, eps);
    const bool given = present(mean);
    ctx->save_for_backward({x, bn_weight.value_or(Tensor()), bn_bias.value_or(Tensor()), given ? *mean : batch_mean,
                            given ? *var : batch_var, weight, bias.value_or(Tensor())});
    ctx->saved_data["batch_stats"] = !given;
    ctx->saved_data["has_residual"] = present(residual);
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["eps"] = eps;
    ctx->mark_non_differentiable({batch_mean, batch_var});
    return {out, batch_mean, batch_var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<Tensors5(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&,
                         const Tensor&, at::IntArrayRef, at::IntArrayRef, double, bool, std::array<bool, 3>)>(
            "ran_ext::bn_relu_conv2d_backward");
    variable_list result(11);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &bn_weight = saved[1], &bn_bias = saved[2], &weight = saved[5], &bias = saved[6];
    const auto stride = ctx->saved_data["stride"].toIntVector(), padding = ctx->saved_data["padding"].toIntVector();
    const bool batch_stats = ctx->saved_data["batch_stats"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    if (ctx->saved_data["has_residual"].toBool()) result[7] = grads[0];
    if (at::GradMode::is_enabled()) {
      const Tensor a = composed::bn_relu(x, bn_weight, bn_bias, saved[3], saved[4], batch_stats, eps);
      const Tensor out = at::conv2d(a, weight, bias, stride, padding);
      const variable_list found = differentiate(out, {x, bn_weight, bn_bias, weight, bias}, grads[0]);
      std::copy_n(found.begin(), 3, result.begin());
      std::copy_n(found.begin() + 3, 2, result.begin() + 5);
      return result;
    }
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0) || ctx->needs_input_grad(1) || ctx->needs_input_grad(2),
                                     weight.requires_grad(), bias.defined() && bias.requires_grad()};
    auto [dx, dbn_weight, dbn_bias, dweight, dbias] =
        op.call(grads[0], x, bn_weight, bn_bias, saved[3], saved[4], weight, stride, padding, eps, batch_stats, wanted);
    if (wanted[0]) {
      result[0] = dx;
      if (bn_weight.defined()) result[1] = dbn_weight.to(bn_weight.scalar_type());
      if (bn_bias.defined()) result[2] = dbn_bias.to(bn_bias.scalar_type());
    }
    if (wanted[1]) result[5] = dweight;
    if (wanted[2]) result[6] = dbias;
    return result;
  }
};

Tensors3 bn_relu_conv2d_autograd(const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias,
                                 const OptTensor& mean, const OptTensor& var, const Tensor& weight,
                                 const OptTensor& bias, const OptTensor& residual, at::IntArrayRef stride,
                                 at::IntArrayRef padding, double eps) {
  const variable_list out =
      BnReluConvFunction::apply(x, bn_weight, bn_bias, mean, var, weight, bias, residual, stride, padding, eps);
  return {out[0], out[1], out[2]};
}

// Autocast as eager PyTorch's: the convolution in the lower precision, batch normalisation's vectors as they are. Where
// x itself is wider (a network's first layer) it is normalised in that precision and rounded once, after the ReLU;
// where the residual is wider the sum is.
template <at::DeviceType device>
Tensors3 bn_relu_conv2d_autocast(const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias,
                                 const OptTensor& mean, const OptTensor& var, const Tensor& weight,
                                 const OptTensor& bias, const OptTensor& residual, at::IntArrayRef stride,
                                 at::IntArrayRef padding, double eps) {
  static const auto op =
      find_op<Tensors3(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                       const Tensor&, const OptTensor&, const OptTensor&, at::IntArrayRef, at::IntArrayRef, double)>(
          "ran_ext::bn_relu_conv2d");
  static const auto bn_relu_op =
      find_op<Tensors3(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, double)>(
          "ran_ext::bn_relu");
  const at::ScalarType lower = at::autocast::get_autocast_dtype(device);
  if (x.scalar_type() != lower && x.scalar_type() != at::kDouble) {
    auto [a, batch_mean, batch_var] = bn_relu_op.call(x, bn_weight, bn_bias, mean, var, eps);
    const Tensor out = at::conv2d(a, weight, bias, stride, padding);  // cast by its own autocast rule
    return {present(residual) ? out + *residual : out, batch_mean, batch_var};
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(x.scalar_type(), t, device); };
  const OptTensor bias_cast = present(bias) ? OptTensor(cast(*bias)) : bias;
  if (!present(residual) || residual->scalar_type() == x.scalar_type())
    return op.call(x, bn_weight, bn_bias, mean, var, cast(weight), bias_cast, residual, stride, padding, eps);
  auto [out, batch_mean, batch_var] =
      op.call(x, bn_weight, bn_bias, mean, var, cast(weight), bias_cast, std::nullopt, stride, padding, eps);
  return {out + *residual, batch_mean, batch_var};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def(
      "bn_relu_conv2d(Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var, Tensor weight, Tensor? "
      "bias, "
      "Tensor? residual, int[2] stride, int[2] padding, float eps) -> (Tensor out, Tensor mean, Tensor var)");
  m.def(
      "bn_relu_conv2d_backward(Tensor dout, Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor var, "
      "Tensor "
      "weight, int[2] stride, int[2] padding, float eps, bool batch_stats, bool[3] wanted) -> "
      "(Tensor dx, Tensor dbn_weight, Tensor dbn_bias, Tensor dweight, Tensor dbias)");
}
TORCH_LIBRARY_IMPL(ran_ext, CPU, m) {
  m.impl("bn_relu_conv2d", bn_relu_conv2d);
  m.impl("bn_relu_conv2d_backward", bn_relu_conv2d_backward);
}
#ifdef RAN_WITH_CUDA
TORCH_LIBRARY_IMPL(ran_ext, CUDA, m) {
  m.impl("bn_relu_conv2d", bn_relu_conv2d);
  m.impl("bn_relu_conv2d_backward", bn_relu_conv2d_backward);
}
#endif
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("bn_relu_conv2d", bn_relu_conv2d_autograd); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCPU, m) { m.impl("bn_relu_conv2d", bn_relu_conv2d_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCUDA, m) { m.impl("bn_relu_conv2d", bn_relu_conv2d_autocast<at::kCUDA>); }

}  // namespace ran
