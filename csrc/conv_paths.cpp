#include "conv_paths.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <limits>
#include <vector>

#include "cuda_conv1x1.h"
#include "library_conv.h"

namespace ran {
namespace {

constexpr const char* kOp = "bn_relu_conv2d";

cpu::ConvShape cpu_shape(const Tensor& x, const Tensor& weight, const Convolution& conv) {
  return {x.size(0),
          x.size(2),
          x.size(3),
          x.size(1),
          conv.out_size(x, weight, 0),
          conv.out_size(x, weight, 1),
          weight.size(0),
          weight.size(2),
          weight.size(3),
          conv.stride[0],
          conv.stride[1],
          conv.padding[0],
          conv.padding[1]};
}

ConvWay cpu_way(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast))
    return {false, "x is not channels_last: .to(memory_format=torch.channels_last) of the network and its input"};
  const cpu::ConvShape shape = cpu_shape(x, weight, conv);
  if (cpu_kernels().conv3x3_supported(dtype_of(x, kOp, "x"), shape)) {
    // Packing the weight takes as long as the gain on so many 2x2 tiles (measured at 64 to 512 channels).
    if (pass == ConvPass::forward && shape.pixels() / 4 < shape.ci * shape.co / 4096)
      return {false, "so few pixels for so many channels: packing the weight would take longer"};
    return {true, "minimal filtering (Winograd) in channels_last"};
  }
  if (!cpu_kernels().conv_supported(dtype_of(x, kOp, "x"), shape))
    return {false, "the matrix products need AVX-512 (bfloat16: AVX-512 BF16) and channels in multiples of 32"};
  if (pass != ConvPass::wgrad && !shape.is_pointwise())
    return {false, "only 1x1 at stride 1, in float32 3x3 at stride 1 and padding 1, and weight gradients have kernels"};
  return {true, "a matrix product in channels_last"};
}

bool takes_fused(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  return conv_way(pass, x, weight, conv).fused;
}

void cpu_conv_forward(ConvOutput& y, const Tensor& x, const BatchNormArgs& bn, const Tensor& weight_,
                      const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                      const NextStatistics& next) {
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  const cpu::ConvShape shape = cpu_shape(x, weight, conv);
  y.out = at::empty({x.size(0), shape.co, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor bias32 = present(bias) ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor added = present(residual) ? gradient_like(kOp, *residual, y.out) : Tensor();
  const float* const bias_data = bias32.defined() ? bias32.const_data_ptr<float>() : nullptr;
  if (!shape.is_pointwise()) {
    cpu_kernels().conv3x3_forward(y.out.data_ptr<float>(), x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                                  nullptr, bias_data, added.defined() ? added.const_data_ptr<float>() : nullptr, false,
                                  shape, &bn.kernel);
    if (next.wanted) std::tie(y.next_mean, y.next_var) = batch_norm_stats(y.out, next.running);
    return;
  }
  if (next.wanted) {
    y.next_mean = at::empty({shape.co}, bn.mean.options());
    y.next_var = at::empty_like(y.next_mean);
  }
  std::vector<double> exact(next.wanted && next.running.kept() ? size_t(2 * shape.co) : 0);
  cpu_kernels().conv1x1_forward(y.out.data_ptr(), next.wanted ? y.next_mean.data_ptr<float>() : nullptr,
                                next.wanted ? y.next_var.data_ptr<float>() : nullptr,
                                exact.empty() ? nullptr : exact.data(), x.const_data_ptr(), weight.const_data_ptr(),
                                bias_data, added.defined() ? added.const_data_ptr() : nullptr, dtype_of(x, kOp, "x"),
                                shape, bn.kernel);
  if (!exact.empty()) next.running.update(exact.data(), shape.pixels());
}

void cpu_weight_gradient(ConvGradients& g, const Tensor& dy, const Tensor& x, const BatchNormArgs& bn,
                         const Tensor& weight, const cpu::ConvShape& shape, bool want_bias) {
  g.dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({shape.co}, bn.mean.options()) : Tensor();
  if (cpu_kernels().conv3x3_supported(dtype_of(x, kOp, "x"), shape)) {
    cpu_kernels().conv3x3_weight_gradient(g.dweight.data_ptr<float>(), want_bias ? dbias.data_ptr<float>() : nullptr,
                                          dy.const_data_ptr<float>(), x.const_data_ptr<float>(), shape, bn.kernel);
    if (want_bias) g.dbias = dbias;
    return;
  }
  // A larger kernel reads each activation many times: it is written out once rather than computed again for every tap.
  const Tensor a = shape.taps() == 1 ? x : bn_relu_apply(x, bn);
  cpu_kernels().conv_weight_gradient(g.dweight.data_ptr(), want_bias ? dbias.data_ptr<float>() : nullptr,
                                     dy.const_data_ptr(), a.const_data_ptr(), dtype_of(x, kOp, "x"), shape,
                                     shape.taps() == 1 ? &bn.kernel : nullptr);
  if (want_bias) g.dbias = dbias.to(x.scalar_type());
}

// dz, the gradient of bn(x), and its sums.
void cpu_data_gradient(Tensor& dz, BackwardSums& sums, const Tensor& dy, const Tensor& x, const BatchNormArgs& bn,
                       const Tensor& weight_, const cpu::ConvShape& shape) {
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  dz = at::empty_like(x);
  sums = {at::empty_like(bn.mean), at::empty_like(bn.mean)};
  if (!shape.is_pointwise()) {
    cpu_kernels().conv3x3_data_gradient(dz.data_ptr<float>(), sums.dz.data_ptr<float>(), sums.dz_xhat.data_ptr<float>(),
                                        dy.const_data_ptr<float>(), x.const_data_ptr<float>(),
                                        weight.const_data_ptr<float>(), shape, bn.kernel);
    return;
  }
  cpu_kernels().conv1x1_data_gradient(dz.data_ptr(), sums.dz.data_ptr<float>(), sums.dz_xhat.data_ptr<float>(),
                                      dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                      dtype_of(x, kOp, "x"), shape, bn.kernel);
}

}  // namespace

void check_convolution(const Tensor& x, const Tensor& weight, const Convolution& conv) {
  RAN_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) > 0 && weight.size(3) > 0, kOp,
                  "weight must be (C_out, ", x.size(1), ", kH, kW), got ", weight.sizes());
  RAN_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), kOp, "weight must have x's dtype ", x.scalar_type(), ", got ",
                 weight.scalar_type());
  RAN_CHECK_VALUE(weight.device() == x.device(), kOp, "weight must be on x's device ", x.device(), ", got ",
                  weight.device());
  // Below 2^31 no sum or product of sizes overflows.
  const auto check_pair = [](const char* name, at::IntArrayRef pair, int64_t least) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const bool fits = pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kMost;
    RAN_CHECK_VALUE(fits, kOp, name, " must be a pair, each from ", least, " to 2**31 - 1, got ", pair);
  };
  check_pair("stride", conv.stride, 1);
  check_pair("padding", conv.padding, 0);
  for (const int i : {0, 1})
    RAN_CHECK_VALUE(x.size(2 + i) + 2 * conv.padding[i] >= weight.size(2 + i), kOp, "x ", x.sizes(), " with padding ",
                    conv.padding, " is smaller than the kernel of weight ", weight.sizes());
}

ConvWay conv_way(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (x.numel() == 0) return {false, "x is empty"};
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return cuda_conv1x1_way(pass, x, weight, conv);
#endif
  return cpu_way(pass, x, weight, conv);
}

ConvWay conv_gate_way(const Tensor& trunk, const Tensor& x, const Tensor& weight, int64_t scale) {
  if (trunk.numel() == 0) return {false, "trunk is empty"};
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return cuda_conv1x1_gate_way(trunk, x, weight, scale);
#endif
  return {false, "the CPU has no kernel for both"};
}

ConvOutput conv_forward(const Tensor& x, const PreActivation& norm, const Tensor& weight, const OptTensor& bias,
                        const OptTensor& residual, const Convolution& conv, const NextStatistics& next) {
  ConvOutput y;
  const bool given = present(norm.mean);
  if (!takes_fused(ConvPass::forward, x, weight, conv)) {
    Tensor a;
    if (given)
      a = bn_relu_apply(x, {kOp, x, norm.weight, norm.bias, *norm.mean, *norm.var, norm.eps});
    else
      std::tie(a, y.mean, y.var) = bn_relu_batch(kOp, x, norm.weight, norm.bias, norm.eps, norm.running);
    y.out = library::conv2d(a, weight, bias, conv.stride, conv.padding);
    if (present(residual)) y.out.add_(*residual);
    if (next.wanted) std::tie(y.next_mean, y.next_var) = batch_norm_stats(dense(y.out), next.running);
    return y;
  }
  if (!given) std::tie(y.mean, y.var) = batch_norm_stats(x, norm.running);
  const BatchNormArgs bn(kOp, x, norm.weight, norm.bias, given ? *norm.mean : y.mean, given ? *norm.var : y.var,
                         norm.eps);
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) {
    cuda_conv1x1_forward(y, x, bn, weight, bias, residual, conv, next);
    return y;
  }
#endif
  cpu_conv_forward(y, x, bn, weight, bias, residual, conv, next);
  return y;
}

ConvGradients conv_backward(const Tensor& dout, const Tensor& x, const Tensor& residual, const BatchNormArgs& bn,
                            bool batch_stats, const Tensor& weight, const Convolution& conv,
                            std::array<bool, 3> wanted) {
  ConvGradients g;
  const bool fused_wgrad = wanted[1] && takes_fused(ConvPass::wgrad, x, weight, conv);
  const bool fused_dgrad = wanted[0] && takes_fused(ConvPass::dgrad, x, weight, conv);
  const Tensor dy = fused_wgrad || fused_dgrad ? dout.contiguous(at::MemoryFormat::ChannelsLast) : dout;
  Tensor dz;  // gradient of bn(x), or, from the library, of relu(bn(x))
  if (x.is_cuda()) {
#ifdef RAN_WITH_CUDA
    if (fused_wgrad) std::tie(g.dweight, g.dbias) = cuda_conv1x1_wgrad(dy, x, bn, weight, conv, wanted[2]);
    if (fused_dgrad) std::tie(dz, g.sums) = cuda_conv1x1_dgrad(dy, x, bn, weight);
#endif
  } else {
    if (fused_wgrad) cpu_weight_gradient(g, dy, x, bn, weight, cpu_shape(x, weight, conv), wanted[2]);
    if (fused_dgrad) cpu_data_gradient(dz, g.sums, dy, x, bn, weight, cpu_shape(x, weight, conv));
  }
  const std::array<bool, 3> left{wanted[0] && !fused_dgrad, wanted[1] && !fused_wgrad, wanted[2] && !fused_wgrad};
  if (left[0] || left[1] || left[2]) {
    const Tensor a = left[1] ? bn_relu_apply(x, bn) : x;  // the data gradient needs its shape only
    const auto [da, dweight, dbias] = library::conv2d_backward(dy, a, weight, conv.stride, conv.padding, left);
    if (left[0]) dz = da.contiguous(format_of(x));
    if (left[1]) g.dweight = dweight;
    if (left[2]) g.dbias = dbias;
  }
  if (!wanted[0]) return g;
  g.dx = x.is_cuda() ? at::empty_like(x) : dz;
  if (fused_dgrad)
    bn_relu_dx(g.dx, dz, x, residual, bn, batch_stats ? &g.sums : nullptr, double(view_of(x).count()));
  else
    g.sums = bn_relu_gradients(g.dx, dz, x, residual, bn, batch_stats);
  return g;
}

}  // namespace ran
