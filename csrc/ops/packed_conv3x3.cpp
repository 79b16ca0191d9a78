// The 3x3 convolution of a folded network on the CPU: its weight packed once, then channels_last tensors in, with bias,
// residual and ReLU. No derivative: a folded network is not trained.
#include <torch/library.h>

#include "../common/kernels.h"
#include "../conv/choose.h"

namespace ran {
namespace {

constexpr const char* kPacked = "conv3x3";

cpu::ConvShape shape_of(const Tensor& x, int64_t co) {
  return {x.size(0), x.size(2), x.size(3), x.size(1), x.size(2), x.size(3), co, 3, 3, 1, 1, 1, 1};
}

// The tile's m of the Winograd kernel that x and a weight of this shape at stride 1 and padding 1 take; 0 for none.
int64_t conv3x3_tile(const Tensor& x, const Tensor& weight, int64_t paths) {
  const bool fits = x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast) && weight.dim() == 4 &&
                    weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3 &&
                    weight.scalar_type() == x.scalar_type();
  if (!fits) return 0;
  return int64_t(choose_conv3x3(ConvPass::forward, dtype_of(x, kPacked, "x"), shape_of(x, weight.size(0)),
                                asked_of(kPacked, paths).conv3x3));
}

// The panels of a weight for a kernel of tiles of m x m outputs, as conv3x3_tile says.
Tensor conv3x3_pack(const Tensor& weight_, const Tensor& x, int64_t m) {
  const auto tile = cpu::Conv3x3(m);
  const bool fits = x.dim() == 4 && weight_.dim() == 4 && weight_.size(1) == x.size(1) && weight_.size(2) == 3 &&
                    weight_.size(3) == 3 && weight_.scalar_type() == x.scalar_type();
  RAN_CHECK_VALUE(fits && (tile == cpu::Conv3x3::f4x4 || tile == cpu::Conv3x3::f2x2) &&
                      cpu_kernels(x).conv3x3_supported(dtype_of(x, kPacked, "x"), shape_of(x, weight_.size(0))),
                  kPacked, "there is no kernel of tiles of ", m, " x ", m, " for x ", x.sizes(), " ", x.scalar_type(),
                  " and weight ", weight_.sizes());
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  const cpu::ConvShape shape = shape_of(x, weight.size(0));
  const DType dtype = dtype_of(x, kPacked, "x");
  const cpu::Kernels& kernels = conv_kernels(dtype, shape);
  Tensor panels = at::empty({kernels.conv3x3_panels_size(tile, shape)}, weight.options().dtype(at::kFloat));
  kernels.conv3x3_pack(tile, panels.data_ptr<float>(), weight.const_data_ptr(), dtype, shape);
  return panels;
}

Tensor conv3x3_packed(const Tensor& x, const Tensor& panels, const Tensor& bias, const OptTensor& residual,
                      bool with_relu) {
  RAN_CHECK_VALUE(x.dim() == 4 && bias.dim() == 1, kPacked, "x must be (N, C, H, W) and bias a vector, got ", x.sizes(),
                  " and ", bias.sizes());
  const cpu::ConvShape shape = shape_of(x, bias.size(0));
  const DType dtype = dtype_of(x, kPacked, "x");
  const cpu::Kernels& kernels = conv_kernels(dtype, shape);
  RAN_CHECK_VALUE(kernels.conv3x3_supported(dtype, shape), kPacked, "there is no kernel for x ", x.sizes(), " ",
                  x.scalar_type());
  // The panels say which tile they are for: a weight that was packed serves other batches too.
  const auto is_for = [&](cpu::Conv3x3 tile) { return panels.numel() == kernels.conv3x3_panels_size(tile, shape); };
  RAN_CHECK_VALUE(x.is_contiguous(at::MemoryFormat::ChannelsLast) && bias.is_contiguous() && panels.is_contiguous() &&
                      bias.scalar_type() == x.scalar_type() && panels.scalar_type() == at::kFloat &&
                      (is_for(cpu::Conv3x3::f4x4) || is_for(cpu::Conv3x3::f2x2)),
                  kPacked, "panels must be conv3x3_pack's of this bias and x, which must be channels_last; got ",
                  panels.sizes(), ", ", bias.sizes(), " and ", x.sizes());
  RAN_CHECK_VALUE(
      !present(residual) || (residual->sizes() == at::IntArrayRef({x.size(0), shape.co, x.size(2), x.size(3)}) &&
                             residual->scalar_type() == x.scalar_type()),
      kPacked, "residual must have the output's shape and the dtype of x, got ", residual->sizes(), " ",
      residual->scalar_type(), " for x ", x.sizes(), " ", x.scalar_type());
  const Tensor bias32 = bias.to(at::kFloat);
  const Tensor added = present(residual) ? residual->contiguous(at::MemoryFormat::ChannelsLast) : Tensor();
  Tensor out = at::empty({x.size(0), shape.co, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  kernels.conv3x3_forward(is_for(cpu::Conv3x3::f4x4) ? cpu::Conv3x3::f4x4 : cpu::Conv3x3::f2x2, out.data_ptr(), nullptr,
                          nullptr, x.const_data_ptr(), nullptr, panels.const_data_ptr<float>(),
                          bias32.const_data_ptr<float>(), added.defined() ? added.const_data_ptr() : nullptr, with_relu,
                          dtype, shape, nullptr);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def("conv3x3_tile(Tensor x, Tensor weight, int paths) -> int");
  m.def("conv3x3_pack(Tensor weight, Tensor x, int tile) -> Tensor");
  m.def("conv3x3_packed(Tensor x, Tensor panels, Tensor bias, Tensor? residual, bool with_relu) -> Tensor");
}
TORCH_LIBRARY_IMPL(ran_ext, CPU, m) {
  m.impl("conv3x3_tile", conv3x3_tile);
  m.impl("conv3x3_pack", conv3x3_pack);
  m.impl("conv3x3_packed", conv3x3_packed);
}

}  // namespace ran
