#include "library_conv.h"

#include <ATen/Functions.h>

#include <limits>

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

// The pixels that the stride reaches: a view.
Tensor reached(const Tensor& x, at::IntArrayRef stride) {
  constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();
  return x.slice(2, 0, kEnd, stride[0]).slice(3, 0, kEnd, stride[1]);
}

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, at::IntArrayRef any_stride,
              at::IntArrayRef padding) {
  const auto stride = bounded(any_stride, x, weight, padding);
  if (is_faulty(x, weight, stride, padding)) return at::conv2d(reached(x, stride), weight, bias);
  return at::conv2d(x, weight, bias, stride, padding);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                   at::IntArrayRef any_stride, at::IntArrayRef padding,
                                                   std::array<bool, 3> wanted) {
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
