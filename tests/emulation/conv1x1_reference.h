// The 1x1 convolutions in double, with the rounding points of the kernels: relu(bn(x)) and every tensor are rounded to
// 16 bits, sums over outputs are of what is stored. And the cases that all three passes are run on.
#pragma once

#include <vector>

#include "../../csrc/common/formulas.h"
#include "../../csrc/cuda/conv1x1_plan.h"
#include "check.h"

namespace check {

using ran::ConvPass;
using ran::cuda::Conv1x1Shape;

struct Conv1x1Case {
  const char* name;
  Conv1x1Shape shape;  // n, h, w, c_in, c_out, stride
  bool normalise;      // else x goes into the product as it is; the forward pass alone takes it so
  int sm_count;        // few make large tiles and several tiles a block, many make small tiles
  int shared_bytes;    // a block may have; decides whether the weight stays in shared memory
  bool whole = false;  // small integers: every sum is exact, so the bits are known
  double shift = 0;    // of the batch normalisation's bias
  int nan_at = -1;     // index in x
  bool affine = true;  // else the batch normalisation has neither weight nor bias
};

inline constexpr int kSmall = 99 << 10, kHopper = 227 << 10;

inline const Conv1x1Case kConv1x1Cases[] = {
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
};

// A buffer with numbers in it.
template <typename T>
struct Filled : emu::Buffer<T> {
  Filled(int64_t count, double low, double high, bool whole) : emu::Buffer<T>(count) { fill(*this, low, high, whole); }
};

// What all passes of a case read. Where numbers are whole the standard deviation is 1, so that z is whole, too.
template <typename T>
struct Conv1x1Inputs {
  const Conv1x1Case& c;
  const Conv1x1Shape& s = c.shape;
  Filled<T> x{s.n * s.h * s.w * s.c_in, -2, 2, c.whole}, weight{s.c_out * s.c_in, -1, 1, c.whole};
  Filled<float> mean{s.c_in, -1, 1, c.whole}, var{s.c_in, 0.5, 2, false}, scale{s.c_in, -2, 2, c.whole},
      bias{s.c_in, c.shift - 1, c.shift + 1, c.whole};

  explicit Conv1x1Inputs(const Conv1x1Case& c) : c(c) {
    begin_case("conv1x1 %s, %s", c.name, Type<T>::name);
    ran::cuda::conv1x1::emulated_device = {80, c.sm_count, c.shared_bytes, c.shared_bytes + 1024};
    for (int64_t i = 0; c.whole && i < s.c_in; ++i) var[i] = 1;
    for (int64_t i = 0; !c.affine && i < s.c_in; ++i) scale[i] = 1, bias[i] = 0;  // what null stands for
    if (c.nan_at >= 0) x[c.nan_at] = make<T>(NAN);
  }
  ran::BatchNorm<float> norm() const {
    if (!c.normalise) return {};
    return {mean.data(), var.data(), c.affine ? scale.data() : nullptr, c.affine ? bias.data() : nullptr, eps()};
  }
  double eps() const { return c.whole ? 0.0 : 1e-5; }
  float z(int64_t at) const {  // of x[at]
    const int64_t i = at % s.c_in;
    return ran::normalise(static_cast<float>(value(x[at])),
                          ran::scale_shift(mean[i], var[i], scale[i], bias[i], static_cast<float>(eps())));
  }
  // Of x that an output row reads.
  int64_t source_row(int64_t row) const {
    const int64_t column = row % s.out_w(), y = row / s.out_w() % s.out_h(), image = row / (s.out_w() * s.out_h());
    return (image * s.h + y * s.stride) * s.w + column * s.stride;
  }
  // relu(bn(x)) as the product sees it, (rows, c_in); x itself where nothing is normalised.
  std::vector<double> activation() const {
    std::vector<double> a(s.rows() * s.c_in);
    for (size_t i = 0; i < a.size(); ++i) {
      const int64_t at = source_row(i / s.c_in) * s.c_in + i % s.c_in;
      a[i] = c.normalise ? value(make<T>(ran::relu(z(at)))) : value(x[at]);
    }
    return a;
  }
};

// What a pass works in; its counters are zero again after it.
struct Conv1x1Scratch {
  emu::Buffer<unsigned char> workspace;
  emu::Buffer<unsigned> counters;

  Conv1x1Scratch(ConvPass pass, const Conv1x1Shape& s)
      : workspace(conv1x1_workspace(pass, s)), counters(conv1x1_counters(pass, s)) {
    std::memset(counters.data(), 0, counters.bytes());
  }
  ~Conv1x1Scratch() {
    for (size_t i = 0; i < counters.size(); ++i) EXPECT(counters[i] == 0);
  }
};

template <typename T>
std::vector<double> values(const emu::Buffer<T>& buffer) {
  std::vector<double> out(buffer.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = value(buffer[i]);
  return out;
}

// A sum and that of its terms' magnitudes, which bounds what a sum in float may be off by.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) { value += term, magnitude += std::fabs(term); }
};

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

template <typename T>
void expect_sums(const char* what, const emu::Buffer<T>& got, const std::vector<Sum>& want, bool exact) {
  EXPECT(got.size() == want.size());
  for (size_t i = 0; i < want.size(); ++i)
    exact ? expect_equal(what, got, i, want[i].value)
          : expect_close(what, got, i, want[i].value, want[i].magnitude, 24);
}

// Calls check(inputs, number of the case) for every case and dtype.
template <typename Check>
void for_each_conv1x1(Check&& check) {
  int number = 0;
  for (const Conv1x1Case& c : kConv1x1Cases) {
    if (wanted("RAN_DTYPES", Type<bf16>::name)) check(Conv1x1Inputs<bf16>(c), number);
    if (wanted("RAN_DTYPES", Type<f16>::name)) check(Conv1x1Inputs<f16>(c), number);
    ++number;
  }
}

}  // namespace check
