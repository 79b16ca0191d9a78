// The 1x1 convolutions in double, and the cases that all three passes are run on.
#pragma once

#include <deque>

#include "conv_reference.h"

namespace check {

using Conv1x1Case = ConvCase<Conv1x1Shape>;
template <typename T>
using Conv1x1Inputs = ConvInputs<T, Conv1x1Shape>;

inline const Conv1x1Case kConv1x1Cases[] = {
    // First, as it soon shows a barrier that is missing in what finds the pieces.
    {"pieces, one pixel, least channels", {1, 1, 1, 8, 8, 1, true}, true, 132, kHopper},
    {"network 32-32", {3, 5, 7, 32, 32, 1}, true, 1, kHopper},
    {"network 32-128", {1, 11, 13, 32, 128, 1}, true, 1, kHopper},
    {"network 128-128", {3, 9, 11, 128, 128, 1}, true, 1, kHopper},
    {"network 128-64", {1, 9, 31, 128, 64, 1}, true, 2, kHopper},
    {"network 64-256", {1, 3, 37, 64, 256, 1}, true, 2, kHopper},
    {"network 128-256 stride 2", {3, 7, 5, 128, 256, 2}, false, 1, kHopper},
    {"network 256-256", {2, 5, 13, 256, 256, 1}, true, 2, kHopper},
    {"network 256-64", {5, 3, 5, 256, 64, 1}, true, 64, kHopper},
    {"network 64-1024", {1, 4, 17, 64, 1024, 1}, true, 132, kHopper},
    {"network 256-1024 stride 2", {5, 6, 7, 256, 1024, 2}, false, 132, kHopper},
    {"network 1024-64", {1, 5, 13, 1024, 64, 1}, true, 132, kHopper},
    {"weight streamed", {1, 17, 17, 256, 128, 1}, true, 1, kSmall},
    {"weight streamed, several tiles", {1, 13, 31, 320, 40, 1}, true, 1, kSmall},
    {"weight streamed, large tile", {1, 7, 37, 448, 72, 1}, true, 1, 120 << 10},
    {"one pixel, least channels", {1, 1, 1, 8, 8, 1}, true, 132, kHopper},
    {"tails everywhere", {3, 7, 7, 72, 136, 1}, true, 1, kHopper},
    {"tails, small tile", {1, 9, 15, 104, 24, 1}, true, 132, kSmall},
    {"stride 2, normalised, odd sizes", {3, 9, 11, 40, 72, 2}, true, 132, kHopper},
    {"large beta", {1, 5, 27, 24, 72, 1}, true, 1, kHopper, false, 100},
    {"whole, large tile", {1, 15, 19, 136, 136, 1}, true, 1, kHopper, true},
    {"whole, tall tile", {3, 7, 13, 72, 64, 1}, true, 1, kHopper, true},
    {"whole, small tile, stride 2", {2, 15, 19, 200, 80, 2}, true, 132, kHopper, true},
    {"whole, plain", {1, 12, 23, 64, 136, 1}, false, 1, kHopper, true},
    {"NaN in x", {1, 6, 23, 40, 136, 1}, true, 1, kHopper, false, 0, 40 * 17 + 21},
    {"NaN in x, plain, stride 2", {1, 6, 23, 40, 72, 2}, false, 132, kHopper, false, 0, 40 * 2 + 5},
    {"plain, large tile", {1, 13, 15, 72, 136, 1}, false, 1, kHopper},
    {"plain, tall tile", {1, 9, 17, 24, 64, 1}, false, 1, kHopper},
    {"plain, small tile", {1, 9, 15, 104, 72, 1}, false, 132, kSmall},
    {"not affine", {2, 5, 9, 24, 40, 1}, true, 132, kHopper, false, 0, -1, false},
    // The depth of forward and of dgrad: two parts of 5 and 4 chunks, the last one short.
    {"whole, forward's depth split", {1, 7, 11, 520, 40, 1}, true, 132, kHopper, true},
    {"whole, dgrad's depth split", {1, 7, 11, 40, 520, 1}, true, 132, kHopper, true},
    {"depth split, weight streamed", {1, 5, 7, 584, 136, 1}, true, 6, kSmall},
    // The pixels of wgrad: six parts of at most 4 chunks, two of at most 5; the last part and its last chunk are short.
    {"whole, pixels split", {1, 39, 37, 24, 16, 1}, true, 132, kHopper, true},
    {"pixels split, large tile", {1, 17, 33, 72, 72, 1}, true, 2, kHopper},
    {"pieces, network 256-256", {1, 5, 13, 256, 256, 1, true}, true, 2, kHopper},
    {"pieces, whole, large tile", {1, 15, 19, 136, 136, 1, true}, true, 1, kHopper, true},
    {"pieces, weight streamed, several tiles", {1, 7, 31, 320, 40, 1, true}, true, 1, kSmall},
    {"pieces, tall tiles", {3, 7, 13, 64, 72, 1, true}, true, 1, kHopper},
    {"pieces, tails everywhere, NaN", {3, 7, 7, 72, 136, 1, true}, true, 1, kHopper, false, 0, 72 * 17 + 49},
    {"pieces, whole, forward's depth split", {1, 7, 11, 520, 40, 1, true}, true, 132, kHopper, true},
    {"pieces, as many as a launch takes", {1, 3, 5, 2048, 24, 1, true}, true, 132, kHopper},
};

// x as a launch is given it: in one buffer, or, where the case says so, in pieces of several widths.
template <typename T>
class Given {
 public:
  explicit Given(const Conv1x1Inputs<T>& in) : in_(in) {
    constexpr int64_t widths[] = {8, 40, 16, 64};
    const int64_t channels = in.s.c_in, pixels = in.x.size() / channels;
    for (int64_t first = 0; in.s.pieces && first < channels; first += pieces_.back().channels) {
      const int64_t width = std::min(widths[pieces_.size() % std::size(widths)], channels - first);
      emu::Buffer<T>& piece = buffers_.emplace_back(pixels * width);
      for (int64_t i = 0; i < pixels * width; ++i) piece[i] = in.x[i / width * channels + first + i % width];
      pieces_.push_back({piece.data(), width});
    }
  }
  ran::Rows x() const {
    if (pieces_.empty()) return in_.x.data();
    return {pieces_.data(), static_cast<int64_t>(pieces_.size())};
  }

 private:
  const Conv1x1Inputs<T>& in_;
  std::deque<emu::Buffer<T>> buffers_;
  std::vector<ran::Rows::Piece> pieces_;
};

// relu(bn(x)) of the pixels that the output rows read, (rows, c_in).
template <typename T>
std::vector<double> activation_rows(const Conv1x1Inputs<T>& in) {
  const Conv1x1Shape& s = in.s;
  const std::vector<double> all = in.activation();
  std::vector<double> a(s.rows() * s.c_in);
  for (size_t i = 0; i < a.size(); ++i) {
    const int64_t row = i / s.c_in, y = row / s.out_w() % s.out_h(), image = row / (s.out_w() * s.out_h());
    const int64_t source = (image * s.h + y * s.stride) * s.w + row % s.out_w() * s.stride;
    a[i] = all[source * s.c_in + i % s.c_in];
  }
  return a;
}

// A matrix in any layout.
struct View {
  const std::vector<double>& data;
  int64_t row_stride, column_stride;
  double at(int64_t i, int64_t j) const { return data[i * row_stride + j * column_stride]; }
};

inline std::vector<Sum> multiply(View a, View b, int64_t rows, int64_t depth, int64_t columns) {
  std::vector<Sum> sums(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j) sums[i * columns + j].add(a.at(i, k) * b.at(k, j));
  return sums;
}

}  // namespace check
