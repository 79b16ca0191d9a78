#ifdef RAN_WITH_CUDA

#include "cuda_conv3x3.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include "../batch_norm/cuda.h"
#include "../common/cuda_launch.h"
#include "../cuda/conv3x3.h"

namespace ran {
namespace {

cuda::Conv3x3Shape shape_of(const Tensor& x, const Tensor& weight, const Convolution& conv) {
  return {x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), int(conv.stride[0]), int(conv.padding[0])};
}

Tensor aligned_weight(const Tensor& weight) { return aligned(weight.contiguous(at::MemoryFormat::ChannelsLast)); }

Tensor scratch_of(ConvPass pass, const cuda::Conv3x3Shape& shape) {
  return scratch(cuda::conv3x3_workspace(pass, shape));
}

}  // namespace

ConvChoice choose_cuda_conv3x3(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (conv.stride[0] != conv.stride[1] || conv.padding[0] != conv.padding[1]) return {ConvPath::library_shape};
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return {ConvPath::library_layout};
  const c10::cuda::CUDAGuard guard(x.device());
  if (!cuda::conv3x3_supported(pass, shape_of(x, weight, conv), dtype_of(x, kBnReluConv2d, "x"), nullptr))
    return {ConvPath::library_refused};
  if (conv.asked.conv3x3 == Conv3x3Mode::fused) return {ConvPath::product, Source::asked};
  if (conv.asked.conv3x3 == Conv3x3Mode::library) return {ConvPath::library_asked, Source::asked};
  const Choice choice = choose_measured(pass_shape(Pass(int(pass)), x, weight, conv), {Path::library, Path::product},
                                        Path::library, tunes_at_first_call());
  return {choice.path == Path::product ? ConvPath::product : ConvPath::library_decided, choice.source};
}

std::string describe_cuda_conv3x3(ConvPath path, ConvPass pass, const Tensor& x, const Tensor& weight,
                                  const Convolution& conv) {
  if (path == ConvPath::library_shape)
    return "only 3x3 convolutions of one stride and one padding in height and width have fused kernels";
  const c10::cuda::CUDAGuard guard(x.device());
  std::string why;
  cuda::conv3x3_supported(pass, shape_of(x, weight, conv), dtype_of(x, kBnReluConv2d, "x"), &why);
  return why;
}

void cuda_conv3x3_forward(ConvOutput& y, const Tensor& x_, const BatchNormArgs& bn, const Tensor& weight_,
                          const OptTensor& bias_, const OptTensor& residual_, const Convolution& conv,
                          const NextStatistics& next) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), weight = aligned_weight(weight_);
  const Tensor bias = present(bias_) ? aligned(bias_->contiguous()) : Tensor();
  y.out = at::empty(conv.out_sizes(x, weight), x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor residual =
      present(residual_) ? aligned_pixels(gradient_like(kBnReluConv2d, *residual_, y.out)) : Tensor();
  const cuda::Conv3x3Shape shape = shape_of(x, weight, conv);
  const Tensor workspace = scratch_of(ConvPass::forward, shape);
  cuda::Conv3x3Forward args{};
  args.y = y.out.mutable_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.weight = weight.const_data_ptr();
  args.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  args.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  const auto kept = in_launch(next.running);
  if (next.wanted) {
    y.next_mean = at::empty({shape.c_out}, bn.mean.options());
    y.next_var = at::empty_like(y.next_mean);
    args.statistics = {y.next_mean.mutable_data_ptr<float>(), y.next_var.mutable_data_ptr<float>(),
                       kept.value_or(cuda::RunningStatistics{})};
  }
  check_launch(cuda::conv3x3_forward(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()), kBnReluConv2d);
  if (next.wanted && next.running.kept() && !kept) next.running.update(y.next_mean, y.next_var, shape.rows());
}

std::tuple<Tensor, BackwardSums> cuda_conv3x3_dgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                                    const Tensor& weight_, const Convolution& conv) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), weight = aligned_weight(weight_), dy = aligned_pixels(dout);
  Tensor dz = at::empty_like(x);
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  const cuda::Conv3x3Shape shape = shape_of(x, weight, conv);
  const Tensor workspace = scratch_of(ConvPass::dgrad, shape);
  cuda::Conv3x3Dgrad args{};
  args.dz = dz.mutable_data_ptr();
  args.sum_dz = sums.dz.mutable_data_ptr<float>();
  args.sum_dz_xhat = sums.dz_xhat.mutable_data_ptr<float>();
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.weight = weight.const_data_ptr();
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::conv3x3_dgrad(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()),
               "bn_relu_conv2d (backward, dx)");
  return {dz, sums};
}

std::tuple<Tensor, Tensor> cuda_conv3x3_wgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                              const Tensor& weight, const Convolution& conv, bool want_bias) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), dy = aligned_pixels(dout);
  Tensor dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({weight.size(0)}, x.options()) : Tensor();
  const cuda::Conv3x3Shape shape = shape_of(x, weight, conv);
  const Tensor workspace = scratch_of(ConvPass::wgrad, shape);
  cuda::Conv3x3Wgrad args{};
  args.dweight = dweight.mutable_data_ptr();
  args.dbias = want_bias ? dbias.mutable_data_ptr() : nullptr;
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::conv3x3_wgrad(args, dtype_of(x, kBnReluConv2d, "x"), current_stream()),
               "bn_relu_conv2d (backward, dweight)");
  return {dweight, dbias};
}

}  // namespace ran

#endif
