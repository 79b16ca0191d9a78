// 2x2 max-pooling: check, allocate, launch; and its derivative.
#include <torch/library.h>

#include "../common/autograd.h"
#include "../common/decomposed.h"
#include "../common/kernels.h"
#include "pyramid.h"

namespace ran {
namespace {

constexpr const char* kMaxPool = "max_pool2d";
constexpr const char* kMaxPoolBackward = "max_pool2d (backward)";
using Tensors2 = std::tuple<Tensor, Tensor>;

// out and index, where in its window each maximum stands: in one byte what torch keeps in eight.
Tensors2 max_pool2d(const Tensor& x_) {
  check_pyramid(kMaxPool, "x", x_);
  const DType dtype = dtype_of(x_, kMaxPool, "x");
  const at::MemoryFormat format = x_.suggest_memory_format();
  const Tensor x = x_.contiguous(format);
  const GateShape shape = pyramid_shape(x, x.size(2), x.size(3), format);
  Tensor out = empty_at(x, shape.mask_h(), shape.mask_w(), format);
  Tensor index = at::empty_like(out, at::kByte);
  if (shape.numel() == 0) return {out, index};
  if (!has_kernels(x)) {
    const auto [a, b] = decomposed::max_pool2d(x);
    return {out.copy_(a), index.copy_(b)};
  }
  RAN_RUN_KERNEL(kMaxPool, x, max_pool_forward, out.data_ptr(), index.mutable_data_ptr<uint8_t>(), x.const_data_ptr(),
                 dtype, shape);
  return {out, index};
}

// height and width are those of x: the index tells them only rounded up to even.
Tensor max_pool2d_backward(const Tensor& dout_, const Tensor& index_, int64_t height, int64_t width) {
  check_pyramid(kMaxPool, "dout", dout_);
  RAN_CHECK_VALUE(index_.sizes() == dout_.sizes() && index_.device() == dout_.device(), kMaxPool, "index must be ",
                  dout_.sizes(), " on ", dout_.device(), ", as dout is, got ", index_.sizes(), " on ", index_.device());
  RAN_CHECK_TYPE(index_.scalar_type() == at::kByte, kMaxPool, "index must be uint8, got ", index_.scalar_type());
  const DType dtype = dtype_of(dout_, kMaxPool, "dout");
  const at::MemoryFormat format = index_.suggest_memory_format();
  const Tensor index = index_.contiguous(format), dout = dout_.contiguous(format);
  const GateShape shape = pyramid_shape(dout, height, width, format);
  check_low(kMaxPool, "dout", dout, shape);
  Tensor dx = empty_at(dout, height, width, format);
  if (shape.numel() == 0) return dx;
  if (!has_kernels(dout)) return dx.copy_(decomposed::max_pool2d_backward(dout, index, height, width));
  RAN_RUN_KERNEL(kMaxPoolBackward, dout, max_pool_backward, dx.data_ptr(), dout.const_data_ptr(),
                 index.const_data_ptr<uint8_t>(), dtype, shape);
  return dx;
}

struct MaxPoolFunction : torch::autograd::Function<MaxPoolFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x) {
    static const auto op = find_op<Tensors2(const Tensor&)>("ran_ext::max_pool2d");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, index] = op.call(x);
    ctx->save_for_backward({index});
    ctx->saved_data["height"] = x.sym_size(2);
    ctx->saved_data["width"] = x.sym_size(3);
    ctx->mark_non_differentiable({index});
    return {out, index};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, c10::SymInt, c10::SymInt)>("ran_ext::max_pool2d_backward");
    if (!grads[0].defined()) return {Tensor()};
    const Tensor index = ctx->get_saved_variables()[0];
    const c10::SymInt height = ctx->saved_data["height"].toSymInt(), width = ctx->saved_data["width"].toSymInt();
    if (at::GradMode::is_enabled())
      return {decomposed::max_pool2d_backward(grads[0], index, height.expect_int(), width.expect_int())};
    return {op.call(grads[0], index, height, width)};
  }
};

Tensors2 max_pool2d_autograd(const Tensor& x) {
  const variable_list out = MaxPoolFunction::apply(x);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("max_pool2d(Tensor x) -> (Tensor out, Tensor index)");
  m.def("max_pool2d_backward(Tensor dout, Tensor index, SymInt height, SymInt width) -> Tensor");
}
RAN_KERNELS(m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_backward", max_pool2d_backward);
}
TORCH_LIBRARY_IMPL(ran_ext, Autograd, m) { m.impl("max_pool2d", max_pool2d_autograd); }

}  // namespace ran
