// What the tests of the 1x1 and the 3x3 convolutions share: a case and its inputs, the rounding points of the kernels
// (relu(bn(x)) and every tensor are rounded to 16 bits, sums over outputs are of what is stored), and comparisons.
#pragma once

#include <vector>

#include "../../csrc/common/formulas.h"
#include "../../csrc/cuda/conv3x3_plan.h"
#include "check.h"

namespace check {

using ran::ConvPass;
using ran::cuda::Conv1x1Shape;
using ran::cuda::Conv3x3Shape;

inline int side(const Conv1x1Shape&) { return 1; }  // of the kernel
inline int side(const Conv3x3Shape&) { return 3; }

template <typename Of>
struct ConvCase {
  using Shape = Of;
  const char* name;
  Shape shape;         // n, h, w, c_in, c_out, stride; and the padding of 3x3
  bool normalise;      // else x goes into the product as it is; the 1x1 forward pass alone takes it so
  int sm_count;        // few make large tiles and several tiles a block, many make small tiles
  int shared_bytes;    // a block may have; decides whether a 1x1 weight stays in shared memory, and a 3x3 patch's size
  bool whole = false;  // small integers: every sum is exact, so the bits are known
  double shift = 0;    // of the batch normalisation's bias
  int nan_at = -1;     // index in x
  bool affine = true;  // else the batch normalisation has neither weight nor bias
};

inline constexpr int kSmall = 99 << 10, kHopper = 227 << 10;

// A buffer with numbers in it.
template <typename T>
struct Filled : emu::Buffer<T> {
  Filled(int64_t count, double low, double high, bool whole) : emu::Buffer<T>(count) { fill(*this, low, high, whole); }
};

// What all passes of a case read. Where numbers are whole the standard deviation is 1, so that z is whole, too.
template <typename T, typename Shape>
struct ConvInputs {
  const ConvCase<Shape>& c;
  const Shape& s = c.shape;
  Filled<T> x{s.n * s.h * s.w * s.c_in, -2, 2, c.whole}, weight{s.c_out * side(s) * side(s) * s.c_in, -1, 1, c.whole};
  Filled<float> mean{s.c_in, -1, 1, c.whole}, var{s.c_in, 0.5, 2, false}, scale{s.c_in, -2, 2, c.whole},
      bias{s.c_in, c.shift - 1, c.shift + 1, c.whole};

  explicit ConvInputs(const ConvCase<Shape>& c) : c(c) {
    begin_case("conv%dx%d %s, %s", side(s), side(s), c.name, Type<T>::name);
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
  // relu(bn(x)) as the products see it; x itself where nothing is normalised.
  std::vector<double> activation() const {
    std::vector<double> a(x.size());
    for (size_t i = 0; i < a.size(); ++i) a[i] = c.normalise ? value(make<T>(ran::relu(z(i)))) : value(x[i]);
    return a;
  }
};

// What a pass works in; its counters are zero again after it.
struct ConvScratch {
  emu::Buffer<unsigned char> workspace;
  emu::Buffer<unsigned> counters;

  ConvScratch(ConvPass pass, const Conv1x1Shape& s)
      : ConvScratch(conv1x1_workspace(pass, s), conv1x1_counters(pass, s)) {}
  ConvScratch(ConvPass pass, const Conv3x3Shape& s) : ConvScratch(conv3x3_workspace(pass, s), 0) {}
  ConvScratch(size_t bytes, size_t words) : workspace(bytes), counters(words) {
    std::memset(counters.data(), 0, counters.bytes());
  }
  ~ConvScratch() {
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

template <typename T>
void expect_sums(const char* what, const emu::Buffer<T>& got, const std::vector<Sum>& want, bool exact) {
  EXPECT(got.size() == want.size());
  for (size_t i = 0; i < want.size(); ++i)
    exact ? expect_equal(what, got, i, want[i].value)
          : expect_close(what, got, i, want[i].value, want[i].magnitude, 24);
}

// What dgrad leaves: dz, and its sums as stored. `want`: the products, which the ReLU's mask is still to be put on.
template <typename T, typename Shape>
void expect_gradients(const ConvInputs<T, Shape>& in, const emu::Buffer<T>& dz, const emu::Buffer<float>& sum_dz,
                      const emu::Buffer<float>& sum_dz_xhat, std::vector<Sum> want) {
  const int64_t channels = in.s.c_in;
  std::vector<Sum> want_sum(channels), want_xhat(channels);
  for (size_t i = 0; i < want.size(); ++i) {
    const int64_t channel = i % channels;
    if (in.z(i) <= 0) want[i] = {};
    const double xhat = (value(in.x[i]) - in.mean[channel]) / std::sqrt(in.var[channel] + in.eps());
    want_sum[channel].add(value(dz[i]));
    want_xhat[channel].add(value(dz[i]) * xhat);
  }
  expect_sums("dz", dz, want, in.c.whole);
  expect_sums("sum_dz", sum_dz, want_sum, in.c.whole);
  expect_sums("sum_dz_xhat", sum_dz_xhat, want_xhat, in.c.whole);
}

// Of stored values; the running ones, which were 1 and 2, have taken `factor` of this batch's.
struct StatisticsBuffers {
  emu::Buffer<float> mean, var, running_mean, running_var;
  emu::Buffer<int64_t> batches{1};

  explicit StatisticsBuffers(size_t channels)
      : mean(channels), var(channels), running_mean(channels), running_var(channels) {}

  ran::cuda::ConvStatistics cumulative() const {
    return {mean.data(), var.data(), {running_mean.data(), running_var.data(), batches.data(), -1.0f}};
  }
  void reset_running(int64_t seen) const {
    for (size_t c = 0; c < running_mean.size(); ++c) running_mean[c] = 1, running_var[c] = 2;
    batches[0] = seen;
  }
  void expect(const std::vector<double>& stored, double factor) const {
    const int64_t channels = mean.size(), count = stored.size() / channels;
    for (int64_t c = 0; c < channels; ++c) {
      Sum m, v;
      for (int64_t r = 0; r < count; ++r) m.add(stored[r * channels + c] / count);
      for (int64_t r = 0; r < count; ++r) v.add(std::pow(stored[r * channels + c] - m.value, 2) / count);
      const double unbiased = v.value * count / (count - 1), spread = std::sqrt(v.value) * m.magnitude;
      expect_close("mean", mean, c, m.value, m.magnitude);
      expect_close("var", var, c, v.value, v.value + spread);
      expect_close("running_mean", running_mean, c, 1 - factor + factor * m.value, 1 + m.magnitude);
      if (count > 1)
        expect_close("running_var", running_var, c, 2 * (1 - factor) + factor * unbiased, 2 + unbiased + spread);
    }
  }
};

// Calls check(inputs, number of the case) for every case and dtype.
template <typename Shape, size_t kCases, typename Check>
void for_each_case(const ConvCase<Shape> (&cases)[kCases], Check&& check) {
  int number = 0;
  for (const ConvCase<Shape>& c : cases) {
    if (wanted("RAN_DTYPES", Type<bf16>::name)) check(ConvInputs<bf16, Shape>(c), number);
    if (wanted("RAN_DTYPES", Type<f16>::name)) check(ConvInputs<f16, Shape>(c), number);
    ++number;
  }
}

}  // namespace check
