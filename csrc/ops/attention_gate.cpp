// The attention gate: check, allocate, launch; and its derivative.
#include <torch/library.h>

#include "../common/autograd.h"
#include "../common/decomposed.h"
#include "../common/kernels.h"

namespace ran {
namespace {

constexpr const char* kGate = "attention_gate";
constexpr const char* kGateBackward = "attention_gate (backward)";

GateShape gate_shape(const Tensor& trunk, const Tensor& mask, int64_t scale) {
  RAN_CHECK_TYPE(trunk.scalar_type() == mask.scalar_type(), kGate,
                 "trunk and mask must have the same dtype, got trunk ", trunk.scalar_type(), " and mask ",
                 mask.scalar_type());
  RAN_CHECK_VALUE(trunk.device() == mask.device(), kGate, "trunk and mask must be on the same device, got trunk on ",
                  trunk.device(), " and mask on ", mask.device());
  RAN_CHECK_VALUE(scale >= 1, kGate, "scale_factor must be at least 1, got ", scale);
  if (scale == 1) {
    RAN_CHECK_VALUE(trunk.sizes() == mask.sizes(), kGate, "trunk and mask must have the same shape, got trunk ",
                    trunk.sizes(), " and mask ", mask.sizes());
    return {1, 1, 1, trunk.numel(), 1, false};
  }
  RAN_CHECK_VALUE(trunk.dim() == 4 && mask.dim() == 4, kGate, "trunk and mask must be (N, C, H, W), got trunk ",
                  trunk.sizes(), " and mask ", mask.sizes());
  const GateShape shape{trunk.size(0),
                        trunk.size(1),
                        trunk.size(2),
                        trunk.size(3),
                        bounded_scale(scale, trunk.sizes()),
                        format_of(trunk) == at::MemoryFormat::ChannelsLast};
  const std::array<int64_t, 4> expected{shape.n, shape.c, shape.mask_h(), shape.mask_w()};
  RAN_CHECK_VALUE(mask.sizes() == at::IntArrayRef(expected), kGate, "mask must be ", at::IntArrayRef(expected),
                  " for trunk ", trunk.sizes(), " and scale_factor ", scale, ", got ", mask.sizes());
  return shape;
}

// Trunk, mask and output gradient in one memory layout: any dense one will do, the trunk's is kept.
Tensor dense_trunk(const Tensor& trunk, int64_t scale) {
  if (scale != 1 && trunk.dim() == 4) return dense(trunk);
  return trunk.is_non_overlapping_and_dense() ? trunk : trunk.contiguous(trunk.suggest_memory_format());
}

Tensor in_layout_of(const Tensor& t, const Tensor& trunk, int64_t scale) {
  if (scale != 1) return t.contiguous(format_of(trunk));
  return t.strides() == trunk.strides() ? t : at::empty_like(trunk).copy_(t);
}

Tensor attention_gate(const Tensor& trunk_, const Tensor& mask_, int64_t scale, bool bilinear) {
  const Tensor trunk = dense_trunk(trunk_, scale);
  const GateShape shape = gate_shape(trunk, mask_, scale);
  const DType dtype = dtype_of(trunk, kGate, "trunk");
  const Tensor mask = in_layout_of(mask_, trunk, scale);
  Tensor out = at::empty_like(trunk);
  if (shape.numel() == 0) return out;
  if (!has_kernels(trunk)) return out.copy_(decomposed::attention_gate(trunk, mask, scale, bilinear));
  if (bilinear && scale > 1) {
    RAN_RUN_KERNEL(kGate, trunk, attention_gate_bilinear_forward, out.data_ptr(), trunk.const_data_ptr(),
                   mask.const_data_ptr(), dtype, shape);
  } else {
    RAN_RUN_KERNEL(kGate, trunk, attention_gate_forward, out.data_ptr(), trunk.const_data_ptr(), mask.const_data_ptr(),
                   dtype, shape);
  }
  return out;
}

std::tuple<Tensor, Tensor> attention_gate_backward(const Tensor& dout_, const Tensor& trunk_, const Tensor& mask_,
                                                   int64_t scale, bool bilinear) {
  const Tensor trunk = dense_trunk(trunk_, scale);
  const GateShape shape = gate_shape(trunk, mask_, scale);
  check_as(kGate, "dout", dout_, trunk.sizes(), trunk);
  const DType dtype = dtype_of(trunk, kGate, "trunk");
  const Tensor mask = in_layout_of(mask_, trunk, scale), dout = in_layout_of(dout_, trunk, scale);
  Tensor dtrunk = at::empty_like(trunk), dmask = at::empty_like(mask);
  if (shape.numel() == 0) return {dtrunk, dmask.zero_()};
  if (!has_kernels(trunk)) {
    const auto [a, b] = decomposed::attention_gate_backward(dout, trunk, mask, scale, bilinear);
    return {dtrunk.copy_(a), dmask.copy_(b)};
  }
  if (bilinear && scale > 1) {
    RAN_RUN_KERNEL(kGateBackward, trunk, attention_gate_bilinear_backward, dtrunk.data_ptr(), dmask.data_ptr(),
                   dout.const_data_ptr(), trunk.const_data_ptr(), mask.const_data_ptr(), dtype, shape);
  } else {
    RAN_RUN_KERNEL(kGateBackward, trunk, attention_gate_backward, dtrunk.data_ptr(), dmask.data_ptr(),
                   dout.const_data_ptr(), trunk.const_data_ptr(), mask.const_data_ptr(), dtype, shape);
  }
  return {dtrunk, dmask};
}

struct AttentionGateFunction : torch::autograd::Function<AttentionGateFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& trunk, const Tensor& mask, int64_t scale, bool bilinear) {
    static const auto op = find_op<decltype(attention_gate)>("ran_ext::attention_gate");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({trunk, mask});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["bilinear"] = bilinear;
    return op.call(trunk, mask, scale, bilinear);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<decltype(attention_gate_backward)>("ran_ext::attention_gate_backward");
    const variable_list saved = ctx->get_saved_variables();
    const int64_t scale = ctx->saved_data["scale"].toInt();
    const bool bilinear = ctx->saved_data["bilinear"].toBool();
    variable_list result(4);
    if (!grads[0].defined()) return result;
    if (at::GradMode::is_enabled()) {
      const auto again = [&](const variable_list& t) {
        return decomposed::attention_gate(t[0], t[1], scale, bilinear);
      };
      const variable_list found = differentiate(again, {saved[0], saved[1]}, grads[0]);
      std::copy_n(found.begin(), 2, result.begin());
    } else {
      std::tie(result[0], result[1]) = op.call(grads[0], saved[0], saved[1], scale, bilinear);
    }
    return result;
  }
};

Tensor attention_gate_autograd(const Tensor& trunk, const Tensor& mask, int64_t scale, bool bilinear) {
  return AttentionGateFunction::apply(trunk, mask, scale, bilinear);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("attention_gate(Tensor trunk, Tensor mask, int scale_factor, bool bilinear=False) -> Tensor");
  m.def(
      "attention_gate_backward(Tensor dout, Tensor trunk, Tensor mask, int scale_factor, bool bilinear=False) -> "
      "(Tensor, Tensor)");
}
RAN_KERNELS(m) {
  m.impl("attention_gate", attention_gate);
  m.impl("attention_gate_backward", attention_gate_backward);
}
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("attention_gate", attention_gate_autograd); }

}  // namespace ran
