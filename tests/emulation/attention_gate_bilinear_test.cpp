// attention_gate_bilinear_{forward,backward} against double.
#include "../../csrc/cuda/attention_gate_bilinear.cu"

#include "check.h"

using namespace check;
using emu::Buffer;

// Where a high coordinate lies between the low ones, the place worked out in float as torch does.
struct Between {
  int64_t low[2];
  double weight[2];
  Between(int64_t x, int64_t high, int64_t low_size) {
    const float place = std::max(std::fma(float(low_size) / float(high), float(x) + 0.5f, -0.5f), 0.0f);
    low[0] = std::min(int64_t(place), low_size - 1);
    low[1] = std::min(low[0] + 1, low_size - 1);
    weight[1] = std::min(double(place) - double(low[0]), 1.0);
    weight[0] = 1 - weight[1];
  }
};

template <typename T>
void check_gate(const ran::GateShape& s, size_t shift = 0, bool nan = false) {
  begin_case("attention_gate_bilinear %s %ldx%ldx%ldx%ld scale %ld %s shift %zu nan %d", Type<T>::name, s.n, s.c, s.h,
             s.w, s.scale, s.channels_last ? "channels_last" : "contiguous", shift, nan);
  const size_t high = s.numel(), low = s.n * s.c * s.mask_h() * s.mask_w();
  Buffer<T> out(high, shift), dtrunk(high, shift), dmask(low, shift), trunk(high, shift), dout(high, shift),
      mask(low, shift);
  fill(trunk, -4, 4);
  fill(dout, -4, 4);
  fill(mask, -6, 6);
  if (nan && low) mask[low / 2] = make<T>(NAN), trunk[high / 3] = make<T>(INFINITY);
  const auto p = [](const auto& b) { return static_cast<void*>(b.data()); };
  const ran::DType dtype = Type<T>::dtype;
  run_schedules(
      [&] { return ran::cuda::attention_gate_bilinear_forward(p(out), p(trunk), p(mask), dtype, s, nullptr); }, out);
  run_schedules(
      [&] {
        return ran::cuda::attention_gate_bilinear_backward(p(dtrunk), p(dmask), p(dout), p(trunk), p(mask), dtype, s,
                                                           nullptr);
      },
      dtrunk, dmask);
  const Layout at{s.c, s.h, s.w, s.channels_last}, low_at{s.c, s.mask_h(), s.mask_w(), s.channels_last};
  std::vector<double> sums(low, 0.0), sizes(low, 0.0);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t y = 0; y < s.h; ++y)
        for (int64_t x = 0; x < s.w; ++x) {
          const Between v(y, s.h, s.mask_h()), u(x, s.w, s.mask_w());
          const auto each = [&](auto&& body) {
            for (int k = 0; k < 4; ++k)
              body(low_at(n, c, v.low[k / 2], u.low[k % 2]), v.weight[k / 2] * u.weight[k % 2]);
          };
          double m = 0;
          each([&](int64_t j, double weight) { m += weight * value(mask[j]); });
          const int64_t i = at(n, c, y, x);
          const double t = value(trunk[i]), d = value(dout[i]), g = 1 / (1 + std::exp(-m));
          expect_close("out", out, i, (1 + g) * t, 2 * t);
          expect_close("dtrunk", dtrunk, i, (1 + g) * d, 2 * d);
          each([&](int64_t j, double weight) {
            sums[j] += weight * d * t * g * (1 - g);
            sizes[j] += std::fabs(weight * d * t);
          });
        }
  for (size_t j = 0; j < low; ++j) expect_close("dmask", dmask, j, sums[j], sizes[j]);
}

int main() {
  for_each_type([](auto type) {
    using T = decltype(type);
    for (const bool channels_last : {false, true})
      for (const bool nan : {false, true}) {
        check_gate<T>({2, 16, 5, 7, 2, channels_last}, 0, nan);
        check_gate<T>({1, 8, 19, 4, 2, channels_last}, 0, nan);  // three walks down the mask
        check_gate<T>({1, 72, 4, 4, 2, channels_last}, 0, nan);
        check_gate<T>({2, 3, 6, 1, 2, channels_last}, 0, nan);
        check_gate<T>({1, 8, 17, 8, 3, channels_last}, 0, nan);
        check_gate<T>({1, 8, 3, 23, 5, channels_last}, 1, nan);
        check_gate<T>({3, 1, 1, 1, 2, channels_last}, 0, nan);
        check_gate<T>({1, 8, 7, 5, 9, channels_last}, 0, nan);
      }
    check_gate<T>({0, 8, 4, 4, 2, false});
    check_gate<T>({1, 1, 2, 700, 2, false});
    check_gate<T>({20, 3, 40, 2, 2, false});
  });
  begin_case("float64");
  EXPECT(ran::cuda::attention_gate_bilinear_forward(nullptr, nullptr, nullptr, ran::DType::f64, {1, 1, 1, 1, 2, false},
                                                    nullptr) == cudaErrorInvalidValue);
  finish("attention_gate_bilinear");
}
