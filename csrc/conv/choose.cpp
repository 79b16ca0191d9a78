#include "choose.h"

#include "../common/kernels.h"
#include "../cpu/parallel.h"
#include "cuda.h"

namespace ran {
namespace {

Path path_of(cpu::Conv3x3 tile) {
  return tile == cpu::Conv3x3::f4x4 ? Path::f4x4 : tile == cpu::Conv3x3::f2x2 ? Path::f2x2 : Path::library;
}

// What the CPU's kernels are allowed of a channels_last convolution, what the rule says, and why where that is the
// library.
struct OnCpu {
  Paths allowed{Path::library};
  Path rule = Path::library;
  ConvPath why_library = ConvPath::library_asked;
};

OnCpu on_cpu(ConvPass pass, DType dtype, const cpu::ConvShape& shape, Conv3x3Mode mode, bool with_norm) {
  OnCpu found;
  const cpu::Kernels& kernels = conv_kernels(dtype, shape);
  const bool is_3x3 = kernels.conv3x3_supported(dtype, shape), strict = mode == Conv3x3Mode::strict;
  if (is_3x3 && mode == Conv3x3Mode::library) return found;
  if (is_3x3) {
    for (const cpu::Conv3x3 tile : {cpu::Conv3x3::f4x4, cpu::Conv3x3::f2x2})
      if (kernels.conv3x3_allowed(tile, pass, dtype, shape, strict)) found.allowed.add(path_of(tile));
    found.rule = path_of(kernels.conv3x3_choice(pass, dtype, shape, strict));
  }
  const bool multiplies = kernels.conv_supported(dtype, shape);
  found.why_library = is_3x3       ? ConvPath::library_better
                      : multiplies ? ConvPath::library_shape
                                   : ConvPath::library_minimum;
  const bool is_product = pass == ConvPass::wgrad || shape.is_pointwise();
  if (!with_norm || !multiplies || !is_product || (is_3x3 && strict)) return found;
  found.allowed.add(Path::product);
  if (found.rule == Path::library) found.rule = Path::product;
  return found;
}

ConvChoice choose_on_cpu(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                         bool with_norm) {
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return {ConvPath::library_layout};
  const OnCpu found = on_cpu(pass, dtype_of(x, "conv", "x"), conv.shape(x, weight), conv.asked.conv3x3, with_norm);
  constexpr int kToConv2d = int(Pass::conv2d_forward);
  const auto measured_pass = Pass(int(pass) + (with_norm ? 0 : kToConv2d));
  const Choice choice = choose_measured(pass_shape(measured_pass, x, weight, conv), found.allowed, found.rule);
  switch (choice.path) {
    case Path::f4x4:
      return {ConvPath::winograd_f4x4, choice.source};
    case Path::f2x2:
      return {ConvPath::winograd_f2x2, choice.source};
    case Path::product:
      return {ConvPath::product, choice.source};
    default:
      break;
  }
  const bool measured = choice.source == Source::tuned || choice.source == Source::shipped;
  return {measured ? ConvPath::library_decided : found.why_library, choice.source};
}

}  // namespace

PassShape pass_shape(Pass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  return {x.is_cpu() ? kCpu : x.get_device(),
          x.is_cpu() ? max_threads() : 0,
          pass,
          dtype_of(x, "conv", "x"),
          {x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), weight.size(2), weight.size(3), conv.stride[0],
           conv.stride[1], conv.padding[0], conv.padding[1]}};
}

ConvChoice choose_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (x.numel() == 0) return {ConvPath::library_empty};
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return choose_cuda_conv(pass, x, weight, conv);
#endif
  return choose_on_cpu(pass, x, weight, conv, /*with_norm=*/true);
}

ConvChoice choose_conv_gate(const Tensor& trunk, [[maybe_unused]] const Tensor& x,
                            [[maybe_unused]] const Tensor& weight, [[maybe_unused]] int64_t scale,
                            [[maybe_unused]] const Asked& asked) {
  if (trunk.numel() == 0) return {ConvPath::library_empty};
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return choose_cuda_conv_gate(trunk, x, weight, scale, asked);
#endif
  return {ConvPath::library_apart};
}

ConvChoice choose_plain_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (!x.is_cpu() || x.numel() == 0) return {ConvPath::library_empty};
  return choose_on_cpu(pass, x, weight, conv, /*with_norm=*/false);
}

cpu::Conv3x3 choose_conv3x3(ConvPass pass, DType dtype, const cpu::ConvShape& shape, Conv3x3Mode mode) {
  if (mode == Conv3x3Mode::library || !conv_kernels(dtype, shape).conv3x3_supported(dtype, shape))
    return cpu::Conv3x3::library;
  return conv_kernels(dtype, shape).conv3x3_choice(pass, dtype, shape, mode == Conv3x3Mode::strict);
}

std::string describe(const ConvChoice& choice, ConvPass pass, const Tensor& x, const Tensor& weight,
                     const Convolution& conv) {
  switch (choice.path) {
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
    case ConvPath::library_decided:
      if (choice.source == Source::asked) return "set_conv1x1('library') was chosen";
      if (choice.source != Source::rule) return "PyTorch's is faster";
      return std::string("not measured at these channels on this GPU: ran_ext.tune measures, set_conv") +
             (weight.size(2) == 3 ? "3x3" : "1x1") + "('fused') takes the kernel";
    case ConvPath::product:
      return "a matrix product in channels_last";
    case ConvPath::library_shape:
    case ConvPath::library_refused:
      break;
  }
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return describe_cuda_conv(choice.path, pass, x, weight, conv);
#endif
  return "only 1x1 at stride 1, most 3x3 at stride 1 and padding 1, and weight gradients have kernels";
}

}  // namespace ran
