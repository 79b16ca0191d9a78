// Torch side of the 3x3 convolution of a folded network on the CPU: its weight packed once, then float channels_last
// tensors in, with bias and ReLU. No derivative: a folded network is not trained.
#include <torch/library.h>

#include "torch_glue.h"

namespace ran {
namespace {

constexpr const char* kOp = "conv3x3";

cpu::ConvShape shape_of(const Tensor& x, int64_t co) {
  return {x.size(0), x.size(2), x.size(3), x.size(1), x.size(2), x.size(3), co, 3, 3, 1, 1, 1, 1};
}

// Whether there is a kernel for x and a weight of this shape at stride 1 and padding 1.
bool conv3x3_supported(const Tensor& x, const Tensor& weight) {
  return x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast) && weight.dim() == 4 &&
         weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3 &&
         weight.scalar_type() == x.scalar_type() &&
         cpu_kernels().conv3x3_supported(dtype_of(x, kOp, "x"), shape_of(x, weight.size(0)));
}

Tensor conv3x3_pack(const Tensor& weight_, const Tensor& x) {
  RAN_CHECK_VALUE(conv3x3_supported(x, weight_), kOp, "there is no kernel for x ", x.sizes(), " ", x.scalar_type(),
                  " and weight ", weight_.sizes());
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  const cpu::ConvShape shape = shape_of(x, weight.size(0));
  Tensor panels = at::empty({cpu_kernels().conv3x3_panels_size(shape)}, weight.options());
  cpu_kernels().conv3x3_pack(panels.data_ptr<float>(), weight.const_data_ptr<float>(), shape);
  return panels;
}

Tensor conv3x3_packed(const Tensor& x, const Tensor& panels, const Tensor& bias, bool with_relu) {
  RAN_CHECK_VALUE(x.dim() == 4 && bias.dim() == 1, kOp, "x must be (N, C, H, W) and bias a vector, got ", x.sizes(),
                  " and ", bias.sizes());
  const cpu::ConvShape shape = shape_of(x, bias.size(0));
  RAN_CHECK_VALUE(cpu_kernels().conv3x3_supported(dtype_of(x, kOp, "x"), shape), kOp, "there is no kernel for x ",
                  x.sizes(), " ", x.scalar_type(), " and ", bias.size(0), " output channels");
  RAN_CHECK_VALUE(x.is_contiguous(at::MemoryFormat::ChannelsLast) && bias.is_contiguous() && panels.is_contiguous() &&
                      panels.numel() == cpu_kernels().conv3x3_panels_size(shape),
                  kOp, "panels must be conv3x3_pack's of this bias and x, which must be channels_last; got ",
                  panels.sizes(), ", ", bias.sizes(), " and ", x.sizes());
  Tensor out = at::empty({x.size(0), shape.co, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  cpu_kernels().conv3x3_forward(out.data_ptr<float>(), x.const_data_ptr<float>(), nullptr,
                                panels.const_data_ptr<float>(), bias.const_data_ptr<float>(), nullptr, with_relu, shape,
                                nullptr);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("conv3x3_supported(Tensor x, Tensor weight) -> bool");
  m.def("conv3x3_pack(Tensor weight, Tensor x) -> Tensor");
  m.def("conv3x3_packed(Tensor x, Tensor panels, Tensor bias, bool with_relu) -> Tensor");
}
TORCH_LIBRARY_IMPL(ran_ext, CPU, m) {
  m.impl("conv3x3_supported", conv3x3_supported);
  m.impl("conv3x3_pack", conv3x3_pack);
  m.impl("conv3x3_packed", conv3x3_packed);
}

}  // namespace ran
