#include "decomposed.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace ran::decomposed {
namespace {

// `sizes` are the result's.
Tensor upsampled(const Tensor& lower, at::IntArrayRef sizes, int64_t scale) {
  scale = bounded_scale(scale, sizes);
  if (scale == 1) return lower;
  return lower.repeat_interleave(scale, 2).repeat_interleave(scale, 3).narrow(2, 0, sizes[2]).narrow(3, 0, sizes[3]);
}

// Of each scale x scale window, the last ones cut off at the border: the gradient of `upsampled`.
Tensor window_sums(const Tensor& t, int64_t scale) {
  scale = bounded_scale(scale, t.sizes());
  if (scale == 1) return t;
  const int64_t h = divide_up(t.size(2), scale), w = divide_up(t.size(3), scale);
  const Tensor whole = at::constant_pad_nd(t, {0, w * scale - t.size(3), 0, h * scale - t.size(2)});
  return whole.reshape({t.size(0), t.size(1), h, scale, w, scale}).sum({3, 5});
}

// A gate's mask at the trunk's resolution.
Tensor wide_mask(const Tensor& mask, const Tensor& trunk, int64_t scale, bool bilinear) {
  return bilinear && scale > 1 ? at::upsample_bilinear2d(mask, trunk.sizes().slice(2), /*align_corners=*/false)
                               : upsampled(mask, trunk.sizes(), scale);
}

}  // namespace

Tensor attention_gate(const Tensor& trunk, const Tensor& mask, int64_t scale, bool bilinear) {
  return (at::sigmoid(wide_mask(mask, trunk, scale, bilinear)) + 1) * trunk;
}

std::tuple<Tensor, Tensor> attention_gate_backward(const Tensor& dout, const Tensor& trunk, const Tensor& mask,
                                                   int64_t scale, bool bilinear) {
  const Tensor s = at::sigmoid(wide_mask(mask, trunk, scale, bilinear)), dwide = dout * trunk * s * (1 - s);
  return {dout * (1 + s), bilinear && scale > 1
                              ? at::upsample_bilinear2d_backward(dwide, trunk.sizes().slice(2), mask.sizes(),
                                                                 /*align_corners=*/false)
                              : window_sums(dwide, scale)};
}

Tensor upsample_add(const Tensor& lower, const Tensor& skip, int64_t height, int64_t width) {
  const Tensor wide = upsampled(lower, {lower.size(0), lower.size(1), height, width}, 2);
  return skip.defined() ? wide + skip : wide;
}

Tensor upsample_add_backward(const Tensor& dout) { return window_sums(dout, 2); }

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x) {
  const auto [out, place] =
      at::max_pool2d_with_indices(x, {2, 2}, {2, 2}, /*padding=*/0, /*dilation=*/1, /*ceil_mode=*/true);
  const int64_t width = x.size(3);
  return {out, place.floor_divide(width).remainder(2) * 2 + place.remainder(width).remainder(2)};
}

Tensor max_pool2d_backward(const Tensor& dout, const Tensor& index, int64_t height, int64_t width) {
  // (N, C, H / 2, 2, W / 2, 2): every window with dout where its maximum stands.
  const auto along = [](const Tensor& t) { return t.unsqueeze(3).unsqueeze(5); };
  const Tensor positions = at::arange(4, index.options()).view({2, 1, 2});
  const Tensor windows = at::where(along(index) == positions, along(dout), at::zeros({}, dout.options()));
  return windows.reshape({dout.size(0), dout.size(1), 2 * dout.size(2), 2 * dout.size(3)})
      .narrow(2, 0, height)
      .narrow(3, 0, width);
}

}  // namespace ran::decomposed
