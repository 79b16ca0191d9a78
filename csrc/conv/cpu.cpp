#include "cpu.h"

#include <ATen/Functions.h>

#include <vector>

#include "../common/kernels.h"

namespace ran {
namespace {

float* floats(const Tensor& t) { return t.defined() ? t.data_ptr<float>() : nullptr; }

}  // namespace

void cpu_conv_forward(ConvOutput& y, ConvPath path, const Tensor& x, const BatchNormArgs* bn, const Tensor& weight_,
                      const OptTensor& bias, const OptTensor& residual, const Convolution& conv,
                      const NextStatistics& next, const Rows* pieces) {
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  const cpu::ConvShape shape = conv.shape(x, weight);
  y.out = at::empty(conv.out_sizes(x, weight), x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor bias32 = present(bias) ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor added = present(residual) ? gradient_like(kBnReluConv2d, *residual, y.out) : Tensor();
  if (next.wanted) {
    y.next_mean = at::empty({shape.co}, bn->mean.options());
    y.next_var = at::empty_like(y.next_mean);
  }
  const void* const added_data = added.defined() ? added.const_data_ptr() : nullptr;
  const DType dtype = dtype_of(x, kBnReluConv2d, "x");
  if (path != ConvPath::product) {
    conv_kernels(dtype, shape)
        .conv3x3_forward(tile_of(path), y.out.data_ptr(), floats(y.next_mean), floats(y.next_var), x.const_data_ptr(),
                         weight.const_data_ptr(), nullptr, floats(bias32), added_data, false, dtype, shape,
                         bn ? &bn->kernel : nullptr);
    if (next.wanted && next.running.kept()) next.running.update(y.next_mean, y.next_var, shape.pixels());
    return;
  }
  std::vector<double> exact(next.wanted && next.running.kept() ? size_t(2 * shape.co) : 0);
  conv_kernels(dtype, shape)
      .conv1x1_forward(y.out.data_ptr(), floats(y.next_mean), floats(y.next_var),
                       exact.empty() ? nullptr : exact.data(), rows_of(x, pieces), weight.const_data_ptr(),
                       floats(bias32), added_data, dtype, shape, bn->kernel);
  if (!exact.empty()) next.running.update(exact.data(), shape.pixels());
}

std::tuple<Tensor, BackwardSums> cpu_conv_dgrad(ConvPath path, const Tensor& dy, const Tensor& x,
                                                const BatchNormArgs* bn, const Tensor& weight_, const Convolution& conv,
                                                const Rows* pieces) {
  const Tensor weight = weight_.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor dz = at::empty_like(x);
  BackwardSums sums;
  if (bn) sums = {at::empty_like(bn->mean), at::empty_like(bn->mean)};
  const DType dtype = dtype_of(x, kBnReluConv2d, "x");
  const cpu::ConvShape shape = conv.shape(x, weight);
  const cpu::Kernels& kernels = conv_kernels(dtype, shape);
  if (path == ConvPath::product)
    kernels.conv1x1_data_gradient(dz.data_ptr(), floats(sums.dz), floats(sums.dz_xhat), dy.const_data_ptr(),
                                  rows_of(x, pieces), weight.const_data_ptr(), dtype, shape, bn->kernel);
  else
    kernels.conv3x3_data_gradient(tile_of(path), dz.data_ptr(), floats(sums.dz), floats(sums.dz_xhat),
                                  dy.const_data_ptr(), bn ? x.const_data_ptr() : nullptr, weight.const_data_ptr(),
                                  dtype, shape, bn ? &bn->kernel : nullptr);
  return {dz, sums};
}

std::tuple<Tensor, Tensor> cpu_conv_wgrad(ConvPath path, const Tensor& dy, const Tensor& x, const BatchNormArgs* bn,
                                          const Tensor& weight, const Convolution& conv, bool want_bias,
                                          const Rows* pieces) {
  const Tensor dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  const cpu::ConvShape shape = conv.shape(x, weight);
  const Tensor dbias = want_bias ? at::empty({shape.co}, x.options().dtype(at::kFloat)) : Tensor();
  const DType dtype = dtype_of(x, kBnReluConv2d, "x");
  if (path == ConvPath::product) {
    // A larger kernel reads each activation many times: it is written out once rather than computed again at every tap.
    const Tensor a = shape.taps() == 1 ? x : bn_relu_apply(x, *bn);
    conv_kernels(dtype, shape)
        .conv_weight_gradient(dweight.data_ptr(), floats(dbias), dy.const_data_ptr(), rows_of(a, pieces), dtype, shape,
                              shape.taps() == 1 ? &bn->kernel : nullptr);
  } else {
    conv_kernels(dtype, shape)
        .conv3x3_weight_gradient(tile_of(path), dweight.data_ptr(), floats(dbias), dy.const_data_ptr(),
                                 x.const_data_ptr(), dtype, shape, bn ? &bn->kernel : nullptr);
  }
  return {dweight, want_bias ? dbias.to(x.scalar_type()) : dbias};
}

}  // namespace ran
