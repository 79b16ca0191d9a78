#include "choose.h"

#include "../common/kernels.h"
#include "cuda.h"

namespace ran {
namespace {

ConvPath winograd(cpu::Conv3x3 tile) {
  return tile == cpu::Conv3x3::f4x4 ? ConvPath::winograd_f4x4 : ConvPath::winograd_f2x2;
}

ConvPath choose_on_cpu(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return ConvPath::library_layout;
  const cpu::ConvShape shape = conv.shape(x, weight);
  const DType dtype = dtype_of(x, "conv", "x");
  const cpu::Conv3x3 tile = choose_conv3x3(pass, dtype, shape, conv.mode);
  if (tile != cpu::Conv3x3::library) return winograd(tile);
  const bool multiplies = conv_kernels(dtype, shape).conv_supported(dtype, shape);
  if (conv_kernels(dtype, shape).conv3x3_supported(dtype, shape)) {
    if (conv.mode == Conv3x3Mode::library) return ConvPath::library_asked;
    if (pass != ConvPass::wgrad || conv.mode == Conv3x3Mode::strict || !multiplies) return ConvPath::library_better;
  }
  if (!multiplies) return ConvPath::library_minimum;
  return pass == ConvPass::wgrad || shape.is_pointwise() ? ConvPath::product : ConvPath::library_shape;
}

}  // namespace

ConvPath choose_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (x.numel() == 0) return ConvPath::library_empty;
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return choose_cuda_conv1x1(pass, x, weight, conv);
#endif
  return choose_on_cpu(pass, x, weight, conv);
}

ConvPath choose_conv_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale) {
  if (trunk.numel() == 0) return ConvPath::library_empty;
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return choose_cuda_conv1x1_gate(trunk, x, weight, scale);
#endif
  return ConvPath::library_apart;
}

ConvPath choose_plain_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (!x.is_cpu() || x.numel() == 0) return ConvPath::library_empty;
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return ConvPath::library_layout;
  const cpu::Conv3x3 tile = choose_conv3x3(pass, dtype_of(x, "conv2d", "x"), conv.shape(x, weight), conv.mode);
  return tile == cpu::Conv3x3::library ? ConvPath::library_better : winograd(tile);
}

cpu::Conv3x3 choose_conv3x3(ConvPass pass, DType dtype, const cpu::ConvShape& shape, Conv3x3Mode mode) {
  if (mode == Conv3x3Mode::library || !conv_kernels(dtype, shape).conv3x3_supported(dtype, shape))
    return cpu::Conv3x3::library;
  return conv_kernels(dtype, shape).conv3x3_choice(pass, dtype, shape, mode == Conv3x3Mode::strict);
}

std::string describe(ConvPath path, ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  switch (path) {
    case ConvPath::winograd_f4x4:
      return "Winograd F(4x4, 3x3)";
    case ConvPath::winograd_f2x2:
      return "Winograd F(2x2, 3x3)";
    case ConvPath::library_empty:
      return "x is empty";
    case ConvPath::library_layout:
      return "x is not channels_last: .to(memory_format=torch.channels_last) of the network and its input";
    case ConvPath::library_asked:
      return "set_conv3x3('library') was chosen";
    case ConvPath::library_better:
      return "at this size PyTorch's 3x3 is faster, or set_conv3x3's rule of accuracy leaves it to PyTorch";
    case ConvPath::library_minimum:
      return "the kernels need AVX2 or NEON, 16 channels or more on either side, and no float64";
    case ConvPath::library_apart:
      return x.is_cuda() ? "the kernel for both up-samples by 1 or 2 only" : "the CPU has no kernel for both";
    case ConvPath::product:
    case ConvPath::library_shape:
    case ConvPath::library_decided:
    case ConvPath::library_refused:
      break;
  }
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return describe_cuda_conv1x1(path, pass, x, weight, conv);
#endif
  return path == ConvPath::product
             ? "a matrix product in channels_last"
             : "only 1x1 at stride 1, most 3x3 at stride 1 and padding 1, and weight gradients have kernels";
}

}  // namespace ran
