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
  const DType dtype = dtype_of(x, kOp, "x");
  switch (conv3x3_kernel(pass, dtype, shape, conv.mode)) {
    case cpu::Conv3x3::f4x4:
      return {true, "Winograd F(4x4, 3x3)"};
    case cpu::Conv3x3::f2x2:
      return {true, "Winograd F(2x2, 3x3)"};
    case cpu::Conv3x3::library:
      break;
  }
  if (cpu_kernels().conv3x3_supported(dtype, shape)) {
    if (conv.mode == Conv3x3Mode::library) return {false, "set_conv3x3('library') was chosen"};
    if (pass != ConvPass::wgrad || conv.mode == Conv3x3Mode::strict || !cpu_kernels().conv_supported(dtype, shape))
      return {false, "at this size PyTorch's 3x3 is faster, or set_conv3x3's rule of accuracy leaves it to PyTorch"};
  }
  if (!cpu_kernels().conv_supported(dtype, shape))
    return {false, "the kernels need AVX2, 16 channels or more on either side, and no float64"};
  if (pass != ConvPass::wgrad && !shape.is_pointwise())
    return {false, "only 1x1 at stride 1, most 3x3 at stride 1 and padding 1, and weight gradients have kernels"};
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
  if (next.wanted) {
    y.next_mean = at::empty({shape.co}, bn.mean.options());
    y.next_var = at::empty_like(y.next_mean);
  }
  float* const next_mean = next.wanted ? y.next_mean.data_ptr<float>() : nullptr;
  float* const next_var = next.wanted ? y.next_var.data_ptr<float>() : nullptr;
  const void* const added_data = added.defined() ? added.const_data_ptr() : nullptr;
  const DType dtype = dtype_of(x, kOp, "x");
  if (shape.is_pointwise()) {
    std::vector<double> exact(next.wanted && next.running.kept() ? size_t(2 * shape.co) : 0);
    cpu_kernels().conv1x1_forward(y.out.data_ptr(), next_mean, next_var, exact.empty() ? nullptr : exact.data(),
                                  x.const_data_ptr(), weight.const_data_ptr(), bias_data, added_data, dtype, shape,
                                  bn.kernel);
    if (!exact.empty()) next.running.update(exact.data(), shape.pixels());
    return;
  }
  cpu_kernels().conv3x3_forward(conv3x3_kernel(ConvPass::forward, dtype, shape, conv.mode), y.out.data_ptr(), next_mean,
                                next_var, x.const_data_ptr(), weight.const_data_ptr(), nullptr, bias_data, added_data,
                                false, dtype, shape, &bn.kernel);
  if (next.wanted && next.running.kept()) next.running.update(y.next_mean, y.next_var, shape.pixels());
}

void cpu_weight_gradient(ConvGradients& g, const Tensor& dy, const Tensor& x, const BatchNormArgs& bn,
                         const Tensor& weight, const cpu::ConvShape& shape, Conv3x3Mode mode, bool want_bias) {
  g.dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({shape.co}, bn.mean.options()) : Tensor();
  const DType dtype = dtype_of(x, kOp, "x");
  float* const dbias_data = want_bias ? dbias.data_ptr<float>() : nullptr;
  const cpu::Conv3x3 tile = conv3x3_kernel(ConvPass::wgrad, dtype, shape, mode);
  if (tile != cpu::Conv3x3::library) {
    cpu_kernels().conv3x3_weight_gradient(tile, g.dweight.data_ptr(), dbias_data, dy.const_data_ptr(),
                                          x.const_data_ptr(), dtype, shape, &bn.kernel);
    if (want_bias) g.dbias = dbias.to(x.scalar_type());
    return;
  }
  // A larger kernel reads each activation many times: it is written out once rather than computed again for every tap.
  const Tensor a = shape.taps() == 1 ? x : bn_relu_apply(x, bn);
  cpu_kernels().conv_weight_gradient(g.dweight.data_ptr(), dbias_data, dy.const_data_ptr(), a.const_data_ptr(), dtype,
                                     shape, shape.taps() == 1 ? &bn.kernel : nullptr);
  if (want_bias) g.dbias = dbias.to(x.scalar_type());
}

// dz, the gradient of bn(x), and its sums.
void cpu_data_gradient(Tensor& dz, BackwardSums& sums, const Tensor& dy, const Tensor& x, const BatchNormArgs& bn,
                       const Tensor& weight_, const cpu::ConvShape& shape, Conv3x3Mode mode) {
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  dz = at::empty_like(x);
  sums = {at::empty_like(bn.mean), at::empty_like(bn.mean)};
  const DType dtype = dtype_of(x, kOp, "x");
  if (!shape.is_pointwise()) {
    cpu_kernels().conv3x3_data_gradient(conv3x3_kernel(ConvPass::dgrad, dtype, shape, mode), dz.data_ptr(),
                                        sums.dz.data_ptr<float>(), sums.dz_xhat.data_ptr<float>(), dy.const_data_ptr(),
                                        x.const_data_ptr(), weight.const_data_ptr(), dtype, shape, &bn.kernel);
    return;
  }
  cpu_kernels().conv1x1_data_gradient(dz.data_ptr(), sums.dz.data_ptr<float>(), sums.dz_xhat.data_ptr<float>(),
                                      dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(), dtype, shape,
                                      bn.kernel);
}

}  // namespace

Conv3x3Mode conv3x3_mode(const char* op, int64_t mode) {
  RAN_CHECK_VALUE(0 <= mode && mode <= 2, op, "conv3x3 must be 0, 1 or 2 (fast, strict, library), got ", mode);
  return Conv3x3Mode(mode);
}

cpu::Conv3x3 conv3x3_kernel(ConvPass pass, DType dtype, const cpu::ConvShape& shape, Conv3x3Mode mode) {
  if (mode == Conv3x3Mode::library || !cpu_kernels().conv3x3_supported(dtype, shape)) return cpu::Conv3x3::library;
  return cpu_kernels().conv3x3_choice(pass, dtype, shape, mode == Conv3x3Mode::strict);
}

void check_convolution(const char* op, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  RAN_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) > 0 && weight.size(3) > 0, op,
                  "weight must be (C_out, ", x.size(1), ", kH, kW), got ", weight.sizes());
  RAN_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, "weight must have x's dtype ", x.scalar_type(), ", got ",
                 weight.scalar_type());
  RAN_CHECK_VALUE(weight.device() == x.device(), op, "weight must be on x's device ", x.device(), ", got ",
                  weight.device());
  // Below 2^31 no sum or product of sizes overflows.
  const auto check_pair = [op](const char* name, at::IntArrayRef pair, int64_t least) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const bool fits = pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kMost;
    RAN_CHECK_VALUE(fits, op, name, " must be a pair, each from ", least, " to 2**31 - 1, got ", pair);
  };
  check_pair("stride", conv.stride, 1);
  check_pair("padding", conv.padding, 0);
  for (const int i : {0, 1})
    RAN_CHECK_VALUE(x.size(2 + i) + 2 * conv.padding[i] >= weight.size(2 + i), op, "x ", x.sizes(), " with padding ",
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
    if (fused_wgrad) cpu_weight_gradient(g, dy, x, bn, weight, cpu_shape(x, weight, conv), conv.mode, wanted[2]);
    if (fused_dgrad) cpu_data_gradient(dz, g.sums, dy, x, bn, weight, cpu_shape(x, weight, conv), conv.mode);
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

// The Winograd kernel that a pass of the convolution alone takes, or `library`.
cpu::Conv3x3 plain_kernel(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  if (!x.is_cpu() || x.numel() == 0 || !x.is_contiguous(at::MemoryFormat::ChannelsLast)) return cpu::Conv3x3::library;
  return conv3x3_kernel(pass, dtype_of(x, "conv2d", "x"), cpu_shape(x, weight, conv), conv.mode);
}

Tensor plain_conv_forward(const Tensor& x, const Tensor& weight_, const OptTensor& bias, const Convolution& conv) {
  const cpu::Conv3x3 tile = plain_kernel(ConvPass::forward, x, weight_, conv);
  if (tile == cpu::Conv3x3::library) return library::conv2d(x, weight_, bias, conv.stride, conv.padding);
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor bias32 = present(bias) ? bias->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::empty({x.size(0), weight.size(0), x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  cpu_kernels().conv3x3_forward(tile, out.data_ptr(), nullptr, nullptr, x.const_data_ptr(), weight.const_data_ptr(),
                                nullptr, bias32.defined() ? bias32.const_data_ptr<float>() : nullptr, nullptr, false,
                                dtype_of(x, "conv2d", "x"), cpu_shape(x, weight, conv), nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> plain_conv_backward(const Tensor& dout, const Tensor& x, const Tensor& weight_,
                                                       const Convolution& conv, std::array<bool, 3> wanted) {
  const cpu::Conv3x3 dgrad = plain_kernel(ConvPass::dgrad, x, weight_, conv);
  const cpu::Conv3x3 wgrad = plain_kernel(ConvPass::wgrad, x, weight_, conv);
  const bool own_dx = wanted[0] && dgrad != cpu::Conv3x3::library;
  const bool own_dweight = wanted[1] && wgrad != cpu::Conv3x3::library;
  const Tensor dy = own_dx || own_dweight ? dout.contiguous(at::MemoryFormat::ChannelsLast) : dout;
  Tensor dx, dweight, dbias;
  if (own_dx) {
    const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
    dx = at::empty_like(x);
    cpu_kernels().conv3x3_data_gradient(dgrad, dx.data_ptr(), nullptr, nullptr, dy.const_data_ptr(), nullptr,
                                        weight.const_data_ptr(), dtype_of(x, "conv2d", "x"),
                                        cpu_shape(x, weight, conv), nullptr);
  }
  if (own_dweight) {
    dweight = at::empty(weight_.sizes(), weight_.options(), at::MemoryFormat::ChannelsLast);
    const Tensor sums = wanted[2] ? at::empty({weight_.size(0)}, x.options().dtype(at::kFloat)) : Tensor();
    cpu_kernels().conv3x3_weight_gradient(wgrad, dweight.data_ptr(), wanted[2] ? sums.data_ptr<float>() : nullptr,
                                          dy.const_data_ptr(), x.const_data_ptr(), dtype_of(x, "conv2d", "x"),
                                          cpu_shape(x, weight_, conv), nullptr);
    if (wanted[2]) dbias = sums.to(x.scalar_type());
  }
  const std::array<bool, 3> left{wanted[0] && !own_dx, wanted[1] && !own_dweight, wanted[2] && !own_dweight};
  if (left[0] || left[1] || left[2]) {
    const auto [a, b, c] = library::conv2d_backward(dy, x, weight_, conv.stride, conv.padding, left);
    if (left[0]) dx = a;
    if (left[1]) dweight = b;
    if (left[2]) dbias = c;
  }
  return {dx, dweight, dbias};
}

}  // namespace ran
