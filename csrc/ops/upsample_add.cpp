// Nearest x2 up-sampling with an addition: check, allocate, launch; and its derivative.
#include <torch/library.h>

#include "../common/autograd.h"
#include "../common/decomposed.h"
#include "../common/kernels.h"
#include "pyramid.h"

namespace ran {
namespace {

constexpr const char* kUpsampleAdd = "upsample_add";
constexpr const char* kUpsampleAddBackward = "upsample_add (backward)";

Tensor upsample_add(const Tensor& lower_, const OptTensor& skip_, int64_t height, int64_t width) {
  check_pyramid(kUpsampleAdd, "lower", lower_);
  const DType dtype = dtype_of(lower_, kUpsampleAdd, "lower");
  const at::MemoryFormat format = (present(skip_) ? *skip_ : lower_).suggest_memory_format();
  const Tensor lower = lower_.contiguous(format);
  const GateShape shape = pyramid_shape(lower, height, width, format);
  check_low(kUpsampleAdd, "lower", lower, shape);
  Tensor out = empty_at(lower, height, width, format), skip;
  if (present(skip_)) {
    RAN_CHECK_VALUE(skip_->sizes() == out.sizes() && skip_->device() == out.device(), kUpsampleAdd, "skip must be ",
                    out.sizes(), " on ", out.device(), ", got ", skip_->sizes(), " on ", skip_->device());
    RAN_CHECK_TYPE(skip_->scalar_type() == out.scalar_type(), kUpsampleAdd,
                   "lower and skip must have the same dtype, got lower ", out.scalar_type(), " and skip ",
                   skip_->scalar_type());
    skip = skip_->contiguous(format);
  }
  if (shape.numel() == 0) return out;
  if (!has_kernels(lower)) return out.copy_(decomposed::upsample_add(lower, skip, height, width));
  RAN_RUN_KERNEL(kUpsampleAdd, lower, upsample_add_forward, out.data_ptr(), lower.const_data_ptr(),
                 skip.defined() ? skip.const_data_ptr() : nullptr, dtype, shape);
  return out;
}

// The gradient of lower; that of skip is dout.
Tensor upsample_add_backward(const Tensor& dout_) {
  check_pyramid(kUpsampleAdd, "dout", dout_);
  const DType dtype = dtype_of(dout_, kUpsampleAdd, "dout");
  const at::MemoryFormat format = dout_.suggest_memory_format();
  const Tensor dout = dout_.contiguous(format);
  const GateShape shape = pyramid_shape(dout, dout.size(2), dout.size(3), format);
  Tensor dlower = empty_at(dout, shape.mask_h(), shape.mask_w(), format);
  if (shape.numel() == 0) return dlower;
  if (!has_kernels(dout)) return dlower.copy_(decomposed::upsample_add_backward(dout));
  RAN_RUN_KERNEL(kUpsampleAddBackward, dout, upsample_add_backward, dlower.data_ptr(), dout.const_data_ptr(), dtype,
                 shape);
  return dlower;
}

struct UpsampleAddFunction : torch::autograd::Function<UpsampleAddFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& lower, const OptTensor& skip, const c10::SymInt& height,
                        const c10::SymInt& width) {
    static const auto op =
        find_op<Tensor(const Tensor&, const OptTensor&, c10::SymInt, c10::SymInt)>("ran_ext::upsample_add");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["has_skip"] = present(skip);
    return op.call(lower, skip, height, width);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<Tensor(const Tensor&)>("ran_ext::upsample_add_backward");
    const Tensor& dout = grads[0];
    variable_list result(4);
    if (!dout.defined()) return result;
    if (ctx->needs_input_grad(0))
      result[0] = at::GradMode::is_enabled() ? decomposed::upsample_add_backward(dout) : op.call(dout);
    if (ctx->saved_data["has_skip"].toBool()) result[1] = dout;
    return result;
  }
};

Tensor upsample_add_autograd(const Tensor& lower, const OptTensor& skip, c10::SymInt height, c10::SymInt width) {
  return UpsampleAddFunction::apply(lower, skip, height, width);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("upsample_add(Tensor lower, Tensor? skip, SymInt height, SymInt width) -> Tensor");
  m.def("upsample_add_backward(Tensor dout) -> Tensor");
}
RAN_KERNELS(m) {
  m.impl("upsample_add", upsample_add);
  m.impl("upsample_add_backward", upsample_add_backward);
}
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("upsample_add", upsample_add_autograd); }

}  // namespace ran
