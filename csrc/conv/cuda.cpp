#ifdef RAN_WITH_CUDA

#include "cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include "../batch_norm/cuda.h"
#include "../common/cuda_launch.h"
#include "../cuda/conv1x1.h"
#include "../cuda/conv3x3.h"

namespace ran {
namespace {

// The kernels of a kernel size: what they take, and what they need.
struct Kernels1x1 {
  static constexpr bool kTakesPieces = true;
  using Shape = cuda::Conv1x1Shape;
  using Forward = cuda::Conv1x1Forward;
  using Dgrad = cuda::Conv1x1Dgrad;
  using Wgrad = cuda::Conv1x1Wgrad;
  static constexpr auto forward = cuda::conv1x1_forward;
  static constexpr auto dgrad = cuda::conv1x1_dgrad;
  static constexpr auto wgrad = cuda::conv1x1_wgrad;

  static Shape shape_of(const Tensor& x, const Tensor& weight, const Convolution& conv) {
    return {x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), int(conv.stride[0])};
  }
  static bool supported(ConvPass pass, const Shape& shape, DType dtype, std::string* why) {
    return cuda::conv1x1_supported(pass, shape, dtype, why);
  }
  static size_t workspace(ConvPass pass, const Shape& s) { return cuda::conv1x1_workspace(pass, s); }
  static size_t counters(ConvPass pass, const Shape& s) { return cuda::conv1x1_counters(pass, s); }
};

struct Kernels3x3 {
  static constexpr bool kTakesPieces = false;
  using Shape = cuda::Conv3x3Shape;
  using Forward = cuda::Conv3x3Forward;
  using Dgrad = cuda::Conv3x3Dgrad;
  using Wgrad = cuda::Conv3x3Wgrad;
  static constexpr auto forward = cuda::conv3x3_forward;
  static constexpr auto dgrad = cuda::conv3x3_dgrad;
  static constexpr auto wgrad = cuda::conv3x3_wgrad;

  static Shape shape_of(const Tensor& x, const Tensor& weight, const Convolution& conv) {
    return {x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), int(conv.stride[0]), int(conv.padding[0])};
  }
  static bool supported(ConvPass pass, const Shape& shape, DType dtype, std::string* why) {
    return cuda::conv3x3_supported(pass, shape, dtype, why);
  }
  static size_t workspace(ConvPass pass, const Shape& s) { return cuda::conv3x3_workspace(pass, s); }
  static size_t counters(ConvPass, const Shape&) { return 0; }
};

bool is_3x3(const Tensor& weight) { return weight.size(2) == 3 && weight.size(3) == 3; }

// f of the kernels for this weight, 3x3 or 1x1.
template <typename F>
auto with_kernels(const Tensor& weight, F&& f) {
  return is_3x3(weight) ? f(Kernels3x3{}) : f(Kernels1x1{});
}

template <typename Kernels>
ScratchWithCounters scratch_of(ConvPass pass, const typename Kernels::Shape& shape) {
  return {Kernels::workspace(pass, shape), Kernels::counters(pass, shape), kBnReluConv2d};
}

// Of x in `pieces` where they are not null.
template <typename Kernels>
typename Kernels::Shape shape_for(const Tensor& x, const Tensor& weight, const Convolution& conv, const Rows* pieces) {
  auto shape = Kernels::shape_of(x, weight, conv);
  if constexpr (Kernels::kTakesPieces) shape.pieces = pieces != nullptr;
  return shape;
}

// What every pass is given: shape, where it works, and, unless `bn` is null, what it normalises with.
template <typename Args, typename Shape>
Args args_for(const Rows& x, const BatchNormArgs* bn, const Shape& shape, const ScratchWithCounters& scratch) {
  Args args{};
  args.x = x;
  if (bn) args.norm = norm_of(*bn);
  args.shape = shape;
  args.workspace = scratch.workspace();
  if constexpr (requires { args.counters; }) args.counters = scratch.counters();
  return args;
}

const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// The weight as the kernels read it: of an output channel, taps and then channels.
Tensor weight_of(const Tensor& weight) { return aligned_pixels(weight); }
Tensor bias_of(const OptTensor& bias) { return present(bias) ? aligned(bias->contiguous()) : Tensor(); }

bool is_asked(ConvPass pass, const Tensor& weight, const Asked& asked, bool fused) {
  if (is_3x3(weight) && pass != ConvPass::gate)
    return asked.conv3x3 == (fused ? Conv3x3Mode::fused : Conv3x3Mode::library);
  return asked.conv1x1 == (fused ? Conv1x1Asked::fused : Conv1x1Asked::library);
}

// Of a pass that there are kernels for, unless they refuse the shape.
ConvChoice fused_or_library(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                            int64_t scale = 1) {
  const c10::cuda::CUDAGuard guard(x.device());
  const DType dtype = dtype_of(x, kBnReluConv2d, "x");
  const bool supported = with_kernels(
      weight, [&](auto kernels) { return kernels.supported(pass, kernels.shape_of(x, weight, conv), dtype, nullptr); });
  if (!supported) return {ConvPath::library_refused};
  if (is_asked(pass, weight, conv.asked, true)) return {ConvPath::product, Source::asked};
  if (is_asked(pass, weight, conv.asked, false))
    return {is_3x3(weight) ? ConvPath::library_asked : ConvPath::library_decided, Source::asked};
  PassShape shape = pass_shape(Pass(int(pass)), x, weight, conv);
  if (pass == ConvPass::gate) shape.sizes[7] = shape.sizes[8] = scale;
  const Choice choice = choose_measured(shape, {Path::library, Path::product}, Path::library, tunes_at_first_call());
  return {choice.path == Path::product ? ConvPath::product : ConvPath::library_decided, choice.source};
}

}  // namespace

ConvChoice choose_cuda_conv(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  const bool is_1x1 = weight.size(2) == 1 && weight.size(3) == 1 && conv.padding[0] == 0 && conv.padding[1] == 0;
  if (!(is_1x1 || (is_3x3(weight) && conv.padding[0] == conv.padding[1])) || conv.stride[0] != conv.stride[1])
    return {ConvPath::library_shape};
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return {ConvPath::library_layout};
  return fused_or_library(pass, x, weight, conv);
}

ConvChoice choose_cuda_conv_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale,
                                 const Asked& asked) {
  if (scale > 2) return {ConvPath::library_apart};
  if (!trunk.is_contiguous(at::MemoryFormat::ChannelsLast) || !x.is_contiguous(at::MemoryFormat::ChannelsLast))
    return {ConvPath::library_layout};
  return fused_or_library(ConvPass::gate, x, weight, {{1, 1}, {0, 0}, asked}, scale);
}

std::string describe_cuda_conv(ConvPath path, ConvPass pass, const Tensor& x, const Tensor& weight,
                               const Convolution& conv) {
  if (path == ConvPath::library_shape)
    return is_3x3(weight) ? "only 3x3 convolutions of one stride and one padding in height and width have fused kernels"
                          : "only 1x1 convolutions without padding, and 3x3 ones, of one stride in height and width, "
                            "have fused kernels";
  const c10::cuda::CUDAGuard guard(x.device());
  std::string why;
  with_kernels(weight, [&](auto kernels) {
    return kernels.supported(pass, kernels.shape_of(x, weight, conv), dtype_of(x, kBnReluConv2d, "x"), &why);
  });
  return why;
}

bool cuda_conv_reads_pieces(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                            const Rows& pieces) {
  const c10::cuda::CUDAGuard guard(x.device());
  const cuda::Conv1x1Shape shape = shape_for<Kernels1x1>(x, weight, conv, &pieces);
  return cuda::reads_pieces(pieces) && Kernels1x1::supported(pass, shape, dtype_of(x, kBnReluConv2d, "x"), nullptr);
}

void cuda_conv_forward(ConvOutput& y, const Tensor& x_, const BatchNormArgs& bn, const Tensor& weight_,
                       const OptTensor& bias_, const OptTensor& residual_, const Convolution& conv,
                       const NextStatistics& next, const Rows* pieces) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = pieces ? x_ : aligned(x_), weight = weight_of(weight_), bias = bias_of(bias_);
  y.out = at::empty(conv.out_sizes(x, weight), x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor residual =
      present(residual_) ? aligned_pixels(gradient_like(kBnReluConv2d, *residual_, y.out)) : Tensor();
  const auto kept = in_launch(next.running);
  with_kernels(weight, [&](auto kernels) {
    using Kernels = decltype(kernels);
    const auto shape = shape_for<Kernels>(x, weight, conv, pieces);
    const ScratchWithCounters scratch = scratch_of<Kernels>(ConvPass::forward, shape);
    auto args = args_for<typename Kernels::Forward>(rows_of(x, pieces), &bn, shape, scratch);
    args.y = y.out.mutable_data_ptr();
    args.weight = weight.const_data_ptr();
    args.bias = data_or_null(bias);
    args.residual = data_or_null(residual);
    if (next.wanted) {
      y.next_mean = at::empty({shape.c_out}, bn.mean.options());
      y.next_var = at::empty_like(y.next_mean);
      args.statistics = {y.next_mean.template mutable_data_ptr<float>(), y.next_var.template mutable_data_ptr<float>(),
                         kept.value_or(cuda::RunningStatistics{})};
    }
    check_launch(Kernels::forward(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()), kBnReluConv2d);
    if (next.wanted && next.running.kept() && !kept) next.running.update(y.next_mean, y.next_var, shape.rows());
  });
}

std::tuple<Tensor, Tensor> cuda_conv_gate(const Tensor& trunk_, const Tensor& x_, const Tensor& weight_,
                                          const OptTensor& bias_, int64_t scale) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor trunk = aligned(trunk_), x = aligned(x_), weight = weight_of(weight_), bias = bias_of(bias_);
  Tensor mask =
      at::empty({x.size(0), weight.size(0), x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  Tensor out = at::empty(trunk.sizes(), trunk.options(), at::MemoryFormat::ChannelsLast);
  const cuda::Conv1x1Shape shape = Kernels1x1::shape_of(x, weight, {{1, 1}, {0, 0}, {}});
  const ScratchWithCounters scratch = scratch_of<Kernels1x1>(ConvPass::gate, shape);
  auto args = args_for<cuda::Conv1x1Forward>(x.const_data_ptr(), nullptr, shape, scratch);
  args.y = mask.mutable_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = data_or_null(bias);
  args.gate = {out.mutable_data_ptr(), trunk.const_data_ptr(), trunk.size(2), trunk.size(3), int(scale)};
  check_launch(cuda::conv1x1_forward(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()), "conv_attention_gate");
  return {out, mask};
}

std::tuple<Tensor, BackwardSums> cuda_conv_dgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                                 const Tensor& weight_, const Convolution& conv, const Rows* pieces) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = pieces ? x_ : aligned(x_), weight = weight_of(weight_), dy = aligned_pixels(dout);
  Tensor dz = at::empty_like(x);
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  with_kernels(weight, [&](auto kernels) {
    using Kernels = decltype(kernels);
    const auto shape = shape_for<Kernels>(x, weight, conv, pieces);
    const ScratchWithCounters scratch = scratch_of<Kernels>(ConvPass::dgrad, shape);
    auto args = args_for<typename Kernels::Dgrad>(rows_of(x, pieces), &bn, shape, scratch);
    args.dz = dz.mutable_data_ptr();
    args.sum_dz = sums.dz.template mutable_data_ptr<float>();
    args.sum_dz_xhat = sums.dz_xhat.template mutable_data_ptr<float>();
    args.dy = dy.const_data_ptr();
    args.weight = weight.const_data_ptr();
    check_launch(Kernels::dgrad(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()),
                 "bn_relu_conv2d (backward, dx)");
  });
  return {dz, sums};
}

std::tuple<Tensor, Tensor> cuda_conv_wgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                           const Tensor& weight, const Convolution& conv, bool want_bias,
                                           const Rows* pieces) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = pieces ? x_ : aligned(x_), dy = aligned_pixels(dout);
  Tensor dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({weight.size(0)}, x.options()) : Tensor();
  with_kernels(weight, [&](auto kernels) {
    using Kernels = decltype(kernels);
    const auto shape = shape_for<Kernels>(x, weight, conv, pieces);
    const ScratchWithCounters scratch = scratch_of<Kernels>(ConvPass::wgrad, shape);
    auto args = args_for<typename Kernels::Wgrad>(rows_of(x, pieces), &bn, shape, scratch);
    args.dweight = dweight.mutable_data_ptr();
    args.dbias = want_bias ? dbias.mutable_data_ptr() : nullptr;
    args.dy = dy.const_data_ptr();
    check_launch(Kernels::wgrad(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()),
                 "bn_relu_conv2d (backward, dweight)");
  });
  return {dweight, dbias};
}

}  // namespace ran

#endif
