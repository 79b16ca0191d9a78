// The 3x3 convolutions in double, and the cases that all three passes are run on.
#pragma once

#include "conv_reference.h"

namespace check {

using Conv3x3Case = ConvCase<Conv3x3Shape>;
template <typename T>
using Conv3x3Inputs = ConvInputs<T, Conv3x3Shape>;

inline const Conv3x3Case kConv3x3Cases[] = {
    {"one output, least channels", {1, 3, 3, 8, 8, 1, 0}, true, 132, kHopper},
    {"one pixel", {1, 1, 1, 8, 16, 1, 1}, true, 132, kSmall},
    {"whole, large tile, several patches", {1, 9, 33, 16, 72, 1, 1}, true, 1, kHopper, true},
    {"whole, tall tile, stride 2", {2, 9, 13, 24, 16, 2, 1}, true, 4, kHopper, true},
    {"whole, large tile, stride 2, no padding", {1, 8, 10, 8, 136, 2, 0}, true, 1, kHopper, true},
    {"whole images of 4x4", {9, 4, 4, 8, 8, 1, 1}, true, 132, kHopper, true},
    {"two chunks, tails", {2, 5, 7, 72, 24, 1, 1}, true, 132, kSmall},
    {"two chunks, large tile, no padding", {1, 7, 6, 80, 80, 1, 0}, true, 1, kHopper},
    {"large beta, even sizes, stride 2", {1, 8, 6, 24, 24, 2, 1}, true, 132, kSmall, false, 100},
    {"large beta", {3, 3, 5, 16, 40, 1, 1}, true, 132, kHopper, false, 100},
    {"small patches, stride 2", {1, 23, 17, 8, 8, 2, 1}, true, 132, 48 << 10, true},
    {"NaN at the border", {1, 6, 9, 8, 16, 1, 1}, true, 132, kHopper, false, 0, 8 * 9 + 3},
    {"NaN, stride 2", {1, 6, 8, 16, 8, 2, 1}, true, 132, kHopper, false, 0, 16 * (5 * 8 + 7) + 2},
};

// Calls body(output pixel, input pixel, tap) for every product that the convolution is a sum of.
template <typename Body>
void for_each_product(const Conv3x3Shape& s, Body&& body) {
  for (int64_t row = 0; row < s.rows(); ++row) {
    const int64_t image = row / (s.out_h() * s.out_w()), y = row / s.out_w() % s.out_h(), x = row % s.out_w();
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t from_y = y * s.stride - s.padding + tap / 3, from_x = x * s.stride - s.padding + tap % 3;
      if (from_y >= 0 && from_y < s.h && from_x >= 0 && from_x < s.w)
        body(row, (image * s.h + from_y) * s.w + from_x, tap);
    }
  }
}

}  // namespace check
