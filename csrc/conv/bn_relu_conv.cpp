#include "bn_relu_conv.h"

#include <ATen/Functions.h>

#include "../batch_norm/cuda.h"
#include "cpu.h"
#include "cuda.h"
#include "library.h"

namespace ran {
namespace {

// After one pass of BN-ReLU, which writes the activation out.
void library_forward(ConvOutput& y, const Tensor& x, const PreActivation& norm, const Tensor& weight,
                     const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                     const NextStatistics& next) {
  Tensor a;
  if (present(norm.mean))
    a = bn_relu_apply(x, {kBnReluConv2d, x, norm.weight, norm.bias, *norm.mean, *norm.var, norm.eps});
  else
    std::tie(a, y.mean, y.var) =
        bn_relu_batch(kBnReluConv2d, x, norm.weight, norm.bias, norm.eps, norm.running, conv.asked);
#ifdef RAN_WITH_CUDA
  // PyTorch would pass over the output for the bias, for the residual, and for the statistics.
  if (x.is_cuda() && next.wanted) {
    const Tensor product = library::conv2d(a, weight, std::nullopt, conv.stride, conv.padding);
    if (auto sum = cuda_add_with_stats(y.next_mean, y.next_var, product, bias, residual, next.running)) {
      y.out = *sum;
      return;
    }
    y.out = present(bias) ? product.add_(bias->view({1, -1, 1, 1})) : product;
  }
#endif
  if (!y.out.defined()) y.out = library::conv2d(a, weight, bias, conv.stride, conv.padding);
  if (present(residual)) y.out.add_(*residual);
  if (next.wanted) std::tie(y.next_mean, y.next_var) = batch_norm_stats(dense(y.out), next.running);
}

// Which of (dgrad, wgrad) take kernels of ours.
struct BackwardPaths {
  ConvPath dgrad = ConvPath::library_empty, wgrad = ConvPath::library_empty;

  // Our kernels read channels_last.
  Tensor laid_out(const Tensor& dout) const {
    return is_fused(dgrad) || is_fused(wgrad) ? dout.contiguous(at::MemoryFormat::ChannelsLast) : dout;
  }
};

// What our kernels compute of dz and the weight's gradients; `bn` null: of the convolution alone.
Tensor fused_backward(ConvGradients& g, const BackwardPaths& paths, const Tensor& dy, const Tensor& x,
                      const BatchNormArgs* bn, const Tensor& weight, const Convolution& conv, bool want_bias,
                      const Rows* pieces = nullptr) {
  Tensor dz;
  const bool dgrad = is_fused(paths.dgrad), wgrad = is_fused(paths.wgrad);
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) {
    if (wgrad) std::tie(g.dweight, g.dbias) = cuda_conv_wgrad(dy, x, *bn, weight, conv, want_bias, pieces);
    if (dgrad) std::tie(dz, g.sums) = cuda_conv_dgrad(dy, x, *bn, weight, conv, pieces);
    return dz;
  }
#endif
  if (wgrad) std::tie(g.dweight, g.dbias) = cpu_conv_wgrad(paths.wgrad, dy, x, bn, weight, conv, want_bias, pieces);
  if (dgrad) std::tie(dz, g.sums) = cpu_conv_dgrad(paths.dgrad, dy, x, bn, weight, conv, pieces);
  return dz;
}

// What is left of `wanted` for the library.
std::array<bool, 3> left_of(std::array<bool, 3> wanted, const BackwardPaths& paths) {
  const bool dgrad = is_fused(paths.dgrad), wgrad = is_fused(paths.wgrad);
  return {wanted[0] && !dgrad, wanted[1] && !wgrad, wanted[2] && !wgrad};
}

// The library's gradients of those in `left`; that of its input is returned.
Tensor library_backward(ConvGradients& g, const Tensor& dy, const Tensor& a, const Tensor& weight,
                        const Convolution& conv, std::array<bool, 3> left) {
  const auto [da, dweight, dbias] = library::conv2d_backward(dy, a, weight, conv.stride, conv.padding, left);
  if (left[1]) g.dweight = dweight;
  if (left[2]) g.dbias = dbias;
  return da;
}

}  // namespace

ConvOutput bn_relu_conv_forward(const Tensor& x, const PreActivation& norm, const Tensor& weight, const OptTensor& bias,
                                const OptTensor& residual, const Convolution& conv, const NextStatistics& next,
                                const Rows* pieces) {
  ConvOutput y;
  const ConvPath path = choose_conv(ConvPass::forward, x, weight, conv);
  if (!is_fused(path)) {
    library_forward(y, x, norm, weight, bias, residual, conv, next);
    return y;
  }
  const bool given = present(norm.mean);
  if (!given) std::tie(y.mean, y.var) = batch_norm_stats(x, norm.running);
  const BatchNormArgs bn(kBnReluConv2d, x, norm.weight, norm.bias, given ? *norm.mean : y.mean,
                         given ? *norm.var : y.var, norm.eps);
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) {
    cuda_conv_forward(y, x, bn, weight, bias, residual, conv, next, pieces);
    return y;
  }
#endif
  cpu_conv_forward(y, path, x, &bn, weight, bias, residual, conv, next, pieces);
  return y;
}

ConvGradients bn_relu_conv_backward(const Tensor& dout, const Tensor& x, const Tensor& residual,
                                    const BatchNormArgs& bn, bool batch_stats, const Tensor& weight,
                                    const Convolution& conv, std::array<bool, 3> wanted, const Rows* pieces) {
  ConvGradients g;
  BackwardPaths paths;
  if (wanted[0]) paths.dgrad = choose_conv(ConvPass::dgrad, x, weight, conv);
  if (wanted[1]) paths.wgrad = choose_conv(ConvPass::wgrad, x, weight, conv);
  const Tensor dy = paths.laid_out(dout);
  // The gradient of bn(x), or, from the library, of relu(bn(x)).
  Tensor dz = fused_backward(g, paths, dy, x, &bn, weight, conv, wanted[2], pieces);
  const std::array<bool, 3> left = left_of(wanted, paths);
  if (left[0] || left[1] || left[2]) {
    const Tensor a = left[1] ? bn_relu_apply(x, bn) : x;  // the data gradient needs its shape only
    const Tensor da = library_backward(g, dy, a, weight, conv, left);
    if (left[0]) dz = da.contiguous(format_of(x));
  }
  if (!wanted[0]) return g;
  g.dx = x.is_cuda() ? at::empty_like(x) : dz;
  if (is_fused(paths.dgrad))
    bn_relu_dx(g.dx, dz, x, residual, bn, batch_stats ? &g.sums : nullptr, double(view_of(x).count()), pieces);
  else
    g.sums = bn_relu_gradients(g.dx, dz, x, residual, bn, batch_stats, conv.asked);
  return g;
}

bool conv_reads_pieces(ConvPass pass, const Tensor& x, const Tensor& weight, const Convolution& conv,
                       const Rows& pieces) {
  if (!conv.shape(x, weight).is_pointwise() || choose_conv(pass, x, weight, conv) != ConvPath::product) return false;
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return cuda_conv_reads_pieces(pass, x, weight, conv, pieces);
#endif
  return pieces.count > 0;
}

Tensor conv_forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Convolution& conv) {
  const ConvPath path = choose_plain_conv(ConvPass::forward, x, weight, conv);
  if (!is_fused(path)) return library::conv2d(x, weight, bias, conv.stride, conv.padding);
  ConvOutput y;
  cpu_conv_forward(y, path, x, nullptr, weight, bias, std::nullopt, conv, {false, {}});
  return y.out;
}

ConvGradients conv_backward(const Tensor& dout, const Tensor& x, const Tensor& weight, const Convolution& conv,
                            std::array<bool, 3> wanted) {
  ConvGradients g;
  BackwardPaths paths;
  if (wanted[0]) paths.dgrad = choose_plain_conv(ConvPass::dgrad, x, weight, conv);
  if (wanted[1]) paths.wgrad = choose_plain_conv(ConvPass::wgrad, x, weight, conv);
  const Tensor dy = paths.laid_out(dout);
  g.dx = fused_backward(g, paths, dy, x, nullptr, weight, conv, wanted[2]);
  const std::array<bool, 3> left = left_of(wanted, paths);
  if (left[0] || left[1] || left[2]) {
    const Tensor dx = library_backward(g, dy, x, weight, conv, left);
    if (left[0]) g.dx = dx;
  }
  return g;
}

}  // namespace ran
