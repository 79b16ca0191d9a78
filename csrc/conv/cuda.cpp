#ifdef RAN_WITH_CUDA

#include "cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include "../batch_norm/cuda.h"
#include "../common/cuda_launch.h"
#include "../cuda/conv1x1.h"

namespace ran {
namespace {

cuda::Conv1x1Shape shape_of(const Tensor& x, const Tensor& weight, int64_t stride) {
  return {x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), int(stride)};
}

cuda::Conv1x1Pass pass_of(ConvPass pass) {
  switch (pass) {
    case ConvPass::dgrad:
      return cuda::Conv1x1Pass::dgrad;
    case ConvPass::wgrad:
      return cuda::Conv1x1Pass::wgrad;
    default:
      return cuda::Conv1x1Pass::forward;
  }
}

ScratchWithCounters scratch_of(cuda::Conv1x1Pass pass, const cuda::Conv1x1Shape& shape) {
  return {cuda::conv1x1_workspace(pass, shape), cuda::conv1x1_counters(pass, shape), kBnReluConv2d};
}

// What a forward pass reads, on 16 bytes, and where it works: alive until its launch is queued.
struct ForwardInputs {
  Tensor x, weight, bias;
  cuda::Conv1x1Shape shape;
  ScratchWithCounters scratch;

  ForwardInputs(const Tensor& x_, const Tensor& weight_, const OptTensor& bias_, int64_t stride)
      : x(aligned(x_)),
        weight(aligned(weight_.contiguous())),
        bias(present(bias_) ? aligned(bias_->contiguous()) : Tensor()),
        shape(shape_of(x, weight, stride)),
        scratch(scratch_of(cuda::Conv1x1Pass::forward, shape)) {}
  cuda::Conv1x1Forward args(const Tensor& y) const {
    cuda::Conv1x1Forward result{};
    result.y = y.mutable_data_ptr();
    result.x = x.const_data_ptr();
    result.weight = weight.const_data_ptr();
    result.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    result.shape = shape;
    result.workspace = scratch.workspace();
    result.counters = scratch.counters();
    return result;
  }
};

}  // namespace

namespace {

// Of a pass that there are kernels for, unless they refuse the shape.
ConvChoice fused_or_library(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                            int64_t scale = 1) {
  const c10::cuda::CUDAGuard guard(x.device());
  if (!cuda::conv1x1_supported(pass_of(pass), shape_of(x, weight, conv.stride[0]), dtype_of(x, kBnReluConv2d, "x"),
                               nullptr))
    return {ConvPath::library_refused};
  if (conv.asked.conv1x1 == Conv1x1Asked::fused) return {ConvPath::product, Source::asked};
  if (conv.asked.conv1x1 == Conv1x1Asked::library) return {ConvPath::library_decided, Source::asked};
  PassShape shape = pass_shape(Pass(int(pass)), x, weight, conv);
  if (pass == ConvPass::gate) shape.sizes[7] = shape.sizes[8] = scale;
  const Choice choice = choose_measured(shape, {Path::library, Path::product}, Path::library, tunes_at_first_call());
  return {choice.path == Path::product ? ConvPath::product : ConvPath::library_decided, choice.source};
}

}  // namespace

ConvChoice choose_cuda_conv1x1(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (weight.size(2) != 1 || weight.size(3) != 1 || conv.padding[0] != 0 || conv.padding[1] != 0 ||
      conv.stride[0] != conv.stride[1])
    return {ConvPath::library_shape};
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return {ConvPath::library_layout};
  return fused_or_library(pass, x, weight, conv);
}

ConvChoice choose_cuda_conv1x1_gate(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale,
                                    const Asked& asked) {
  if (scale > 2) return {ConvPath::library_apart};
  if (!trunk.is_contiguous(at::MemoryFormat::ChannelsLast) || !x.is_contiguous(at::MemoryFormat::ChannelsLast))
    return {ConvPath::library_layout};
  return fused_or_library(ConvPass::gate, x, weight, {{1, 1}, {0, 0}, asked}, scale);
}

std::string describe_cuda_conv1x1(ConvPath path, ConvPass pass, const Tensor& x, const Tensor& weight,
                                  const Convolution& conv) {
  if (path == ConvPath::library_shape)
    return "only 1x1 convolutions without padding, and 3x3 ones, of one stride in height and width, have fused kernels";
  const c10::cuda::CUDAGuard guard(x.device());
  std::string why;
  cuda::conv1x1_supported(pass_of(pass), shape_of(x, weight, conv.stride[0]), dtype_of(x, kBnReluConv2d, "x"), &why);
  return why;
}

void cuda_conv1x1_forward(ConvOutput& y, const Tensor& x, const BatchNormArgs& bn, const Tensor& weight,
                          const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                          const NextStatistics& next) {
  const c10::cuda::CUDAGuard guard(x.device());
  const ForwardInputs in(x, weight, bias, conv.stride[0]);
  const cuda::Conv1x1Shape& shape = in.shape;
  y.out = at::empty(conv.out_sizes(x, weight), x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor added = present(residual) ? aligned_pixels(gradient_like(kBnReluConv2d, *residual, y.out)) : Tensor();
  cuda::Conv1x1Forward args = in.args(y.out);
  args.norm = norm_of(bn);
  args.residual = added.defined() ? added.const_data_ptr() : nullptr;
  const auto kept = in_launch(next.running);
  if (next.wanted) {
    y.next_mean = at::empty({shape.c_out}, bn.mean.options());
    y.next_var = at::empty_like(y.next_mean);
    args.statistics = {y.next_mean.mutable_data_ptr<float>(), y.next_var.mutable_data_ptr<float>(),
                       kept.value_or(cuda::RunningStatistics{})};
  }
  check_launch(cuda::conv1x1_forward(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()), kBnReluConv2d);
  if (next.wanted && next.running.kept() && !kept) next.running.update(y.next_mean, y.next_var, shape.rows());
}

std::tuple<Tensor, Tensor> cuda_conv1x1_gate(const Tensor& trunk_, const Tensor& x, const Tensor& weight,
                                             const OptTensor& bias, int64_t scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor trunk = aligned(trunk_);
  const ForwardInputs in(x, weight, bias, 1);
  Tensor mask =
      at::empty({x.size(0), weight.size(0), x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  Tensor out = at::empty(trunk.sizes(), trunk.options(), at::MemoryFormat::ChannelsLast);
  cuda::Conv1x1Forward args = in.args(mask);
  args.gate = {out.mutable_data_ptr(), trunk.const_data_ptr(), trunk.size(2), trunk.size(3), int(scale)};
  check_launch(cuda::conv1x1_forward(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()), "conv_attention_gate");
  return {out, mask};
}

std::tuple<Tensor, BackwardSums> cuda_conv1x1_dgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                                    const Tensor& weight_) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), weight = aligned(weight_.contiguous()), dy = aligned_pixels(dout);
  Tensor dz = at::empty_like(x);
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  const cuda::Conv1x1Shape shape = shape_of(x, weight, 1);
  const ScratchWithCounters scratch = scratch_of(cuda::Conv1x1Pass::dgrad, shape);
  cuda::Conv1x1Dgrad args{};
  args.dz = dz.mutable_data_ptr();
  args.sum_dz = sums.dz.mutable_data_ptr<float>();
  args.sum_dz_xhat = sums.dz_xhat.mutable_data_ptr<float>();
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.weight = weight.const_data_ptr();
  args.shape = shape;
  args.workspace = scratch.workspace();
  args.counters = scratch.counters();
  check_launch(cuda::conv1x1_dgrad(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()),
               "bn_relu_conv2d (backward, dx)");
  return {dz, sums};
}

std::tuple<Tensor, Tensor> cuda_conv1x1_wgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                              const Tensor& weight, const Convolution& conv, bool want_bias) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), dy = aligned_pixels(dout);
  Tensor dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({weight.size(0)}, x.options()) : Tensor();
  const cuda::Conv1x1Shape shape = shape_of(x, weight, conv.stride[0]);
  const Tensor workspace = scratch(cuda::conv1x1_workspace(cuda::Conv1x1Pass::wgrad, shape));
  cuda::Conv1x1Wgrad args{};
  args.dweight = dweight.mutable_data_ptr();
  args.dbias = want_bias ? dbias.mutable_data_ptr() : nullptr;
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::conv1x1_wgrad(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()),
               "bn_relu_conv2d (backward, dweight)");
  return {dweight, dbias};
}

}  // namespace ran

#endif
