// The 3x3 convolutions in double, with the rounding points of the kernels, as conv1x1_reference.h has those of the 1x1
// ones; and the cases that all three passes are run on.
#pragma once

#include "../../csrc/cuda/conv3x3_plan.h"
#include "conv1x1_reference.h"

namespace check {

using ran::ConvPass;
using ran::cuda::Conv3x3Shape;

struct Conv3x3Case {
  const char* name;
  Conv3x3Shape shape;  // n, h, w, c_in, c_out, stride, padding
  int sm_count;        // few make large tiles and several patches a block
  int shared_bytes;    // a block may have; few make small patches
  bool whole = false;  // small integers: every sum is exact, so the bits are known
  double shift = 0;    // of the batch normalisation's bias
  int nan_at = -1;     // index in x
};

inline const Conv3x3Case kConv3x3Cases[] = {
    {"one output, least channels", {1, 3, 3, 8, 8, 1, 0}, 132, kHopper},
    {"one pixel", {1, 1, 1, 8, 16, 1, 1}, 132, kSmall},
    {"whole, large tile, several patches", {1, 9, 33, 16, 72, 1, 1}, 1, kHopper, true},
    {"whole, tall tile, stride 2", {2, 9, 13, 24, 16, 2, 1}, 4, kHopper, true},
    {"whole, large tile, stride 2, no padding", {1, 8, 10, 8, 136, 2, 0}, 1, kHopper, true},
    {"whole images of 4x4", {9, 4, 4, 8, 8, 1, 1}, 132, kHopper, true},
    {"two chunks, tails", {2, 5, 7, 72, 24, 1, 1}, 132, kSmall},
    {"two chunks, large tile, no padding", {1, 7, 6, 80, 80, 1, 0}, 1, kHopper},
    {"large beta, even sizes, stride 2", {1, 8, 6, 24, 24, 2, 1}, 132, kSmall, false, 100},
    {"large beta", {3, 3, 5, 16, 40, 1, 1}, 132, kHopper, false, 100},
    {"small patches, stride 2", {1, 23, 17, 8, 8, 2, 1}, 132, 48 << 10, true},
    {"NaN at the border", {1, 6, 9, 8, 16, 1, 1}, 132, kHopper, false, 0, 8 * 9 + 3},
    {"NaN, stride 2", {1, 6, 8, 16, 8, 2, 1}, 132, kHopper, false, 0, 16 * (5 * 8 + 7) + 2},
};

// What all passes of a case read. Where numbers are whole the standard deviation is 1, so that z is whole, too.
template <typename T>
struct Conv3x3Inputs {
  const Conv3x3Case& c;
  const Conv3x3Shape& s = c.shape;
  Filled<T> x{s.n * s.h * s.w * s.c_in, -2, 2, c.whole}, weight{s.c_out * 9 * s.c_in, -1, 1, c.whole};
  Filled<float> mean{s.c_in, -1, 1, c.whole}, var{s.c_in, 0.5, 2, false}, scale{s.c_in, -2, 2, c.whole},
      bias{s.c_in, c.shift - 1, c.shift + 1, c.whole};

  explicit Conv3x3Inputs(const Conv3x3Case& c) : c(c) {
    begin_case("conv3x3 %s, %s", c.name, Type<T>::name);
    ran::cuda::conv1x1::emulated_device = {80, c.sm_count, c.shared_bytes, c.shared_bytes + 1024};
    for (int64_t i = 0; c.whole && i < s.c_in; ++i) var[i] = 1;
    if (c.nan_at >= 0) x[c.nan_at] = make<T>(NAN);
  }
  ran::BatchNorm<float> norm() const { return {mean.data(), var.data(), scale.data(), bias.data(), eps()}; }
  double eps() const { return c.whole ? 0.0 : 1e-5; }
  float z(int64_t at) const {  // of x[at]
    const int64_t i = at % s.c_in;
    return ran::normalise(static_cast<float>(value(x[at])),
                          ran::scale_shift(mean[i], var[i], scale[i], bias[i], static_cast<float>(eps())));
  }
  // relu(bn(x)) as the products see it.
  std::vector<double> activation() const {
    std::vector<double> a(x.size());
    for (size_t i = 0; i < a.size(); ++i) a[i] = value(make<T>(ran::relu(z(i))));
    return a;
  }
  // Calls body(output pixel, input pixel, tap) for every product that the convolution is a sum of.
  template <typename Body>
  void for_each_product(Body&& body) const {
    for (int64_t row = 0; row < s.rows(); ++row) {
      const int64_t image = row / (s.out_h() * s.out_w()), y = row / s.out_w() % s.out_h(), x = row % s.out_w();
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t from_y = y * s.stride - s.padding + tap / 3, from_x = x * s.stride - s.padding + tap % 3;
        if (from_y >= 0 && from_y < s.h && from_x >= 0 && from_x < s.w)
          body(row, (image * s.h + from_y) * s.w + from_x, tap);
      }
    }
  }
};

// What a pass works in. It has no room for a copy of x, once x has so many pixels that blocks share them.
inline emu::Buffer<unsigned char> conv3x3_scratch(ConvPass pass, const Conv3x3Shape& s) {
  return emu::Buffer<unsigned char>(conv3x3_workspace(pass, s));
}

// Calls check(inputs, number of the case) for every case and dtype.
template <typename Check>
void for_each_conv3x3(Check&& check) {
  int number = 0;
  for (const Conv3x3Case& c : kConv3x3Cases) {
    if (wanted("RAN_DTYPES", Type<bf16>::name)) check(Conv3x3Inputs<bf16>(c), number);
    if (wanted("RAN_DTYPES", Type<f16>::name)) check(Conv3x3Inputs<f16>(c), number);
    ++number;
  }
}

}  // namespace check
