// A convolution with nothing to fuse as an op of torch: schema, derivative, autocast.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../common/autograd.h"
#include "../conv/bn_relu_conv.h"
#include "../conv/library.h"

namespace ran {
namespace {

constexpr const char* kConv2d = "conv2d";
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

Tensor conv2d(const Tensor& x_, const Tensor& weight, const OptTensor& bias, at::IntArrayRef stride,
              at::IntArrayRef padding, int64_t paths) {
  const Tensor x = dense_activation(kConv2d, x_);
  const Convolution conv{stride, padding, asked_of(kConv2d, paths)};
  check_convolution(kConv2d, x, weight, conv);
  check_bias(kConv2d, bias, weight);
  return conv_forward(x, weight, bias, conv);
}

// dx, dweight and dbias where `wanted`, the others empty.
Tensors3 conv2d_backward(const Tensor& dout, const Tensor& x_, const Tensor& weight, at::IntArrayRef stride,
                         at::IntArrayRef padding, std::array<bool, 3> wanted, int64_t paths) {
  const Tensor x = dense_activation(kConv2d, x_);
  const Convolution conv{stride, padding, asked_of(kConv2d, paths)};
  check_convolution(kConv2d, x, weight, conv);
  check_as(kConv2d, "dout", dout, conv.out_sizes(x, weight), x);
  const ConvGradients g = conv_backward(dout, x, weight, conv, wanted);
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, x.options()); };
  return {or_empty(g.dx), or_empty(g.dweight), or_empty(g.dbias)};
}

struct Conv2dFunction : torch::autograd::Function<Conv2dFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                        at::IntArrayRef stride, at::IntArrayRef padding, int64_t paths) {
    static const auto op = find_op<decltype(conv2d)>("ran_ext::conv2d");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight, bias.value_or(Tensor())});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["paths"] = paths;
    return op.call(x, weight, bias, stride, padding, paths);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<decltype(conv2d_backward)>("ran_ext::conv2d_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2];
    const auto stride = ctx->saved_data["stride"].toIntVector(), padding = ctx->saved_data["padding"].toIntVector();
    variable_list result(6);
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) { return library::conv2d(t[0], t[1], t[2], stride, padding); };
      const variable_list found = differentiate(again, {x, weight, bias}, grads[0]);
      std::copy(found.begin(), found.end(), result.begin());
      return result;
    }
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     bias.defined() && ctx->needs_input_grad(2)};
    const auto [dx, dweight, dbias] =
        op.call(grads[0], x, weight, stride, padding, wanted, ctx->saved_data["paths"].toInt());
    if (wanted[0]) result[0] = dx;
    if (wanted[1]) result[1] = dweight;
    if (wanted[2]) result[2] = dbias;
    return result;
  }
};

Tensor conv2d_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, int64_t paths) {
  return Conv2dFunction::apply(x, weight, bias, stride, padding, paths);
}

// As eager PyTorch's: all in the lower precision, but for float64.
template <at::DeviceType device>
Tensor conv2d_autocast(const Tensor& x, const Tensor& weight, const OptTensor& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, int64_t paths) {
  static const auto op = find_op<decltype(conv2d)>("ran_ext::conv2d");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const at::ScalarType lower = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(lower, t, device); };
  return op.call(cast(x), cast(weight), present(bias) ? OptTensor(cast(*bias)) : bias, stride, padding, paths);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int paths=0) -> Tensor");
  m.def(
      "conv2d_backward(Tensor dout, Tensor x, Tensor weight, int[2] stride, int[2] padding, bool[3] wanted, "
      "int paths=0) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}
TORCH_LIBRARY_IMPL(ran_ext, CPU, m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d_backward", conv2d_backward);
}
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("conv2d", conv2d_autograd); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCPU, m) { m.impl("conv2d", conv2d_autocast<at::kCPU>); }

}  // namespace ran
