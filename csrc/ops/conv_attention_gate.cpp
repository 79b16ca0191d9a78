// The attention gate whose mask is the output of a 1x1 convolution, in one kernel where there is one for both;
// elsewhere the convolution runs, then the gate.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../common/autograd.h"
#include "../common/decomposed.h"
#include "../conv/cuda.h"
#include "../conv/library.h"

namespace ran {
namespace {

constexpr const char* kConvGate = "conv_attention_gate";

using Tensors2 = std::tuple<Tensor, Tensor>;
using GateOp = Tensor(const Tensor&, const Tensor&, int64_t, bool bilinear);
using GateBackwardOp = Tensors2(const Tensor&, const Tensor&, const Tensor&, int64_t, bool bilinear);

void check(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale) {
  RAN_CHECK_VALUE(scale >= 1, kConvGate, "scale_factor must be at least 1, got ", scale);
  RAN_CHECK_VALUE(trunk.dim() == 4 && x.dim() == 4, kConvGate, "trunk and x must be (N, C, H, W), got trunk ",
                  trunk.sizes(), " and x ", x.sizes());
  const std::array<int64_t, 4> expected{trunk.size(0), x.size(1), divide_up(trunk.size(2), scale),
                                        divide_up(trunk.size(3), scale)};
  RAN_CHECK_VALUE(x.sizes() == at::IntArrayRef(expected), kConvGate, "x must be ", at::IntArrayRef(expected),
                  " for trunk ", trunk.sizes(), " and scale_factor ", scale, ", got ", x.sizes());
  const std::array<int64_t, 4> kernel{trunk.size(1), x.size(1), 1, 1};
  RAN_CHECK_VALUE(weight.sizes() == at::IntArrayRef(kernel), kConvGate, "weight must be ", at::IntArrayRef(kernel),
                  ", got ", weight.sizes());
  RAN_CHECK_VALUE(trunk.device() == x.device() && weight.device() == x.device(), kConvGate,
                  "trunk, x and weight must be on the same device, got ", trunk.device(), ", ", x.device(), " and ",
                  weight.device());
  RAN_CHECK_TYPE(trunk.scalar_type() == x.scalar_type() && weight.scalar_type() == x.scalar_type(), kConvGate,
                 "trunk, x and weight must have the same dtype, got ", trunk.scalar_type(), ", ", x.scalar_type(),
                 " and ", weight.scalar_type());
}

// The gated trunk, and the mask's logits, which backward needs.
Tensors2 conv_attention_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                             int64_t scale, int64_t paths) {
  static const auto gate = find_op<GateOp>("ran_ext::attention_gate");
  check(trunk, x, weight, scale);
  check_bias(kConvGate, bias, weight);
  [[maybe_unused]] const Asked asked = asked_of(kConvGate, paths);
#ifdef RAN_WITH_CUDA
  if (is_fused(choose_conv_gate(trunk, x, weight, scale, asked))) return cuda_conv_gate(trunk, x, weight, bias, scale);
#endif
  const Tensor mask = library::conv2d(x, weight, bias, {1, 1}, {0, 0});
  return {gate.call(trunk, mask, scale, false), mask};
}

struct ConvAttentionGateFunction : torch::autograd::Function<ConvAttentionGateFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& trunk, const Tensor& x, const Tensor& weight,
                               const OptTensor& bias, int64_t scale, int64_t paths) {
    static const auto op = find_op<decltype(conv_attention_gate)>("ran_ext::conv_attention_gate");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, mask] = op.call(trunk, x, weight, bias, scale, paths);
    ctx->save_for_backward({trunk, x, weight, bias.value_or(Tensor()), mask});
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({mask});
    return {out, mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto gate_backward = find_op<GateBackwardOp>("ran_ext::attention_gate_backward");
    variable_list result(6);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &trunk = saved[0], &x = saved[1], &weight = saved[2], &bias = saved[3], &mask = saved[4];
    const int64_t scale = ctx->saved_data["scale"].toInt();
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) {
        return decomposed::attention_gate(t[0], library::conv2d(t[1], t[2], t[3], {1, 1}, {0, 0}), scale);
      };
      const variable_list found = differentiate(again, {trunk, x, weight, bias}, grads[0]);
      std::copy_n(found.begin(), 4, result.begin());
      return result;
    }
    auto [dtrunk, dmask] = gate_backward.call(grads[0], trunk, mask, scale, false);
    result[0] = dtrunk;
    const std::array<bool, 3> wanted{x.requires_grad(), weight.requires_grad(), bias.defined() && bias.requires_grad()};
    if (wanted[0] || wanted[1] || wanted[2])
      std::tie(result[1], result[2], result[3]) = library::conv2d_backward(dmask, x, weight, {1, 1}, {0, 0}, wanted);
    return result;
  }
};

Tensors2 conv_attention_gate_autograd(const Tensor& trunk, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                      int64_t scale, int64_t paths) {
  const variable_list out = ConvAttentionGateFunction::apply(trunk, x, weight, bias, scale, paths);
  return {out[0], out[1]};
}

// Autocast as eager PyTorch's: the convolution in the lower precision, and the gate in the wider of its two dtypes.
template <at::DeviceType device>
Tensors2 conv_attention_gate_autocast(const Tensor& trunk, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                      int64_t scale, int64_t paths) {
  static const auto op = find_op<decltype(conv_attention_gate)>("ran_ext::conv_attention_gate");
  static const auto gate = find_op<GateOp>("ran_ext::attention_gate");
  const at::ScalarType lower = x.scalar_type() == at::kDouble ? at::kDouble : at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(lower, t, device); };
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const OptTensor bias_cast = present(bias) ? OptTensor(cast(*bias)) : bias;
  if (trunk.scalar_type() == lower) return op.call(trunk, cast(x), cast(weight), bias_cast, scale, paths);
  const Tensor mask = library::conv2d(cast(x), cast(weight), bias_cast, {1, 1}, {0, 0});
  const at::ScalarType wider = c10::promoteTypes(trunk.scalar_type(), lower);
  return {gate.call(trunk.to(wider), mask.to(wider), scale, false), mask};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def(
      "conv_attention_gate(Tensor trunk, Tensor x, Tensor weight, Tensor? bias, int scale_factor, int paths=0) -> "
      "(Tensor out, Tensor mask)");
}
RAN_KERNELS(m) { m.impl("conv_attention_gate", conv_attention_gate); }
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("conv_attention_gate", conv_attention_gate_autograd); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCPU, m) { m.impl("conv_attention_gate", conv_attention_gate_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(ran_ext, AutocastCUDA, m) { m.impl("conv_attention_gate", conv_attention_gate_autocast<at::kCUDA>); }

}  // namespace ran
