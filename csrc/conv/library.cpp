#include "library.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>
#include <tuple>

#include "../batch_norm/cuda.h"

namespace ran::library {
namespace {

bool is_faulty(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding) {
  return x.is_cpu() && weight.size(1) < 8 && weight.size(2) == 1 && weight.size(3) == 1 &&
         std::max(stride[0], stride[1]) > 1 && std::max(padding[0], padding[1]) == 0;
}

// The stride, no larger than it takes to read one pixel: beyond that nothing changes, and oneDNN's derivative divides
// by what it computes of it.
std::array<int64_t, 2> bounded(at::IntArrayRef stride, const Tensor& x, const Tensor& weight, at::IntArrayRef padding) {
  std::array<int64_t, 2> result;
  for (const int i : {0, 1}) result[i] = std::min(stride[i], x.size(2 + i) + 2 * padding[i] - weight.size(2 + i) + 1);
  return result;
}

// Whether the library has no fast kernel for x's 16 bits on this processor; its slow one takes ten times as long as the
// same in float.
bool is_slow(const Tensor& x) {
  const auto supported = [](const char* op) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<bool()>().call();
  };
  static const bool has_bf16 = supported("mkldnn::_is_mkldnn_bf16_supported");
  static const bool has_f16 = supported("mkldnn::_is_mkldnn_fp16_supported");
  if (!x.is_cpu()) return false;
  return (x.scalar_type() == at::kBFloat16 && !has_bf16) || (x.scalar_type() == at::kHalf && !has_f16);
}

// The pixels that the stride reaches: a view.
Tensor reached(const Tensor& x, at::IntArrayRef stride) {
  constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();
  return x.slice(2, 0, kEnd, stride[0]).slice(3, 0, kEnd, stride[1]);
}

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, at::IntArrayRef any_stride,
              at::IntArrayRef padding) {
  if (is_slow(x)) {
    const OptTensor wide_bias = present(bias) ? OptTensor(bias->to(at::kFloat)) : bias;
    return library::conv2d(x.to(at::kFloat), weight.to(at::kFloat), wide_bias, any_stride, padding).to(x.scalar_type());
  }
  const auto stride = bounded(any_stride, x, weight, padding);
  if (is_faulty(x, weight, stride, padding)) return at::conv2d(reached(x, stride), weight, bias);
  const Tensor out = at::conv2d(x, weight, bias, stride, padding);
  // On a GPU the library has no float64 in channels_last, and would give NCHW for it.
  return x.is_cuda() && x.scalar_type() == at::kDouble ? out.contiguous(x.suggest_memory_format()) : out;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                   at::IntArrayRef any_stride, at::IntArrayRef padding,
                                                   std::array<bool, 3> wanted) {
#ifdef RAN_WITH_CUDA
  if (wanted[2])
    if (const auto sums = cuda_channel_sums(dout)) {  // in less than half of the time that PyTorch's sum takes
      Tensor dx, dweight;
      if (wanted[0] || wanted[1])
        std::tie(dx, dweight, std::ignore) =
            library::conv2d_backward(dout, x, weight, any_stride, padding, {wanted[0], wanted[1], false});
      return {dx, dweight, *sums};
    }
#endif
  if (is_slow(x)) {
    const auto wide = [](const Tensor& t) { return t.to(at::kFloat); };
    const auto narrow = [&](const Tensor& t) { return t.defined() ? t.to(x.scalar_type()) : t; };
    const auto [dx, dweight, dbias] =
        library::conv2d_backward(wide(dout), wide(x), wide(weight), any_stride, padding, wanted);
    return {narrow(dx), narrow(dweight), narrow(dbias)};
  }
  const auto stride = bounded(any_stride, x, weight, padding);
  const auto backward = [&](const Tensor& of, at::IntArrayRef at_stride) {
    return at::convolution_backward(dout, of, weight, at::IntArrayRef(weight.size(0)), at_stride, padding, {1, 1},
                                    false, {0, 0}, 1, wanted);
  };
  if (!is_faulty(x, weight, stride, padding)) return backward(x, stride);
  auto [dx, dweight, dbias] = backward(reached(x, stride), {1, 1});
  if (wanted[0]) {
    const Tensor whole = at::zeros_like(x);
    reached(whole, stride).copy_(dx);
    dx = whole;
  }
  return {dx, dweight, dbias};
}

}  // namespace ran::library
