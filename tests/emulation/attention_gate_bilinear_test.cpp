// attention_gate_bilinear_{forward,backward} against double.
#include "../../csrc/cuda/attention_gate_bilinear.cu"

#include "gate_case.h"

using namespace check;

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
  GateCase<T> g(s, shift, false);
  if (nan) g.add_nan();
  g.run(ran::cuda::attention_gate_bilinear_forward, ran::cuda::attention_gate_bilinear_backward);
  std::vector<double> sums(g.low, 0.0), sizes(g.low, 0.0);
  g.for_each_value([&](int64_t n, int64_t c, int64_t y, int64_t x) {
    const Between v(y, s.h, s.mask_h()), u(x, s.w, s.mask_w());
    const auto each = [&](auto&& body) {
      for (int k = 0; k < 4; ++k) body(g.low_at(n, c, v.low[k / 2], u.low[k % 2]), v.weight[k / 2] * u.weight[k % 2]);
    };
    double m = 0;
    each([&](int64_t j, double weight) { m += weight * value(g.mask[j]); });
    const int64_t i = g.at(n, c, y, x);
    const double t = value(g.trunk[i]), d = value(g.dout[i]), gate = 1 / (1 + std::exp(-m));
    expect_close("out", g.out, i, (1 + gate) * t, 2 * t);
    expect_close("dtrunk", g.dtrunk, i, (1 + gate) * d, 2 * d);
    each([&](int64_t j, double weight) {
      sums[j] += weight * d * t * gate * (1 - gate);
      sizes[j] += std::fabs(weight * d * t);
    });
  });
  for (size_t j = 0; j < g.low; ++j) expect_close("dmask", g.dmask, j, sums[j], sizes[j]);
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
