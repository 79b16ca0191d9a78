// attention_gate_{forward,backward} against double.
#include "../../csrc/cuda/attention_gate.cu"

#include "gate_case.h"

using namespace check;

enum class Inputs { random, whole, nan };

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <typename T>
void check_gate(const ran::GateShape& s, size_t shift, Inputs inputs) {
  begin_case("attention_gate %s %ldx%ldx%ldx%ld scale %ld %s shift %zu inputs %d", Type<T>::name, s.n, s.c, s.h, s.w,
             s.scale, s.channels_last ? "channels_last" : "contiguous", shift, static_cast<int>(inputs));
  const bool whole = inputs == Inputs::whole;
  GateCase<T> g(s, shift, whole);
  // The sigmoid is exactly 1/2, 1 or 0.
  if (whole)
    for (size_t i = 0; i < g.low; ++i) g.mask[i] = make<T>(200.0 * (static_cast<int>(random_bits() % 3) - 1));
  if (inputs == Inputs::nan) g.add_nan();
  g.run(ran::cuda::attention_gate_forward, ran::cuda::attention_gate_backward);
  std::vector<double> sums(g.low, 0.0), sizes(g.low, 0.0);
  g.for_each_value([&](int64_t n, int64_t c, int64_t y, int64_t x) {
    const int64_t i = g.at(n, c, y, x), j = g.low_at(n, c, y / s.scale, x / s.scale);
    const double t = value(g.trunk[i]), d = value(g.dout[i]), gate = sigmoid(value(g.mask[j]));
    if (whole) {
      expect_equal("out", g.out, i, (1 + gate) * t);
      expect_equal("dtrunk", g.dtrunk, i, (1 + gate) * d);
    } else {
      expect_close("out", g.out, i, (1 + gate) * t, 2 * t);
      expect_close("dtrunk", g.dtrunk, i, (1 + gate) * d, 2 * d);
    }
    sums[j] += d * t * gate * (1 - gate);
    sizes[j] += std::fabs(d * t * gate);
  });
  for (size_t j = 0; j < g.low; ++j)
    if (whole)
      expect_equal("dmask", g.dmask, j, sums[j]);
    else
      expect_close("dmask", g.dmask, j, sums[j], sizes[j]);
}

int main() {
  for_each_type([](auto type) {
    using T = decltype(type);
    const int64_t sizes[] = {0, 1, 7, 8, 31, 1000, 4096 + 5, 9001};
    for (const int64_t n : sizes)
      for (const size_t shift : {0, 1})
        check_gate<T>({1, 1, 1, n, 1, false}, shift, n % 2 ? Inputs::whole : Inputs::random);
    for (const bool channels_last : {false, true})
      for (const Inputs inputs : {Inputs::random, Inputs::whole, Inputs::nan}) {
        check_gate<T>({2, 16, 5, 7, 2, channels_last}, 0, inputs);
        check_gate<T>({1, 72, 4, 4, 2, channels_last}, 0, inputs);
        check_gate<T>({2, 3, 6, 1, 2, channels_last}, 0, inputs);
        check_gate<T>({1, 8, 7, 8, 3, channels_last}, 0, inputs);
        check_gate<T>({1, 8, 3, 3, 2, channels_last}, 1, inputs);
        check_gate<T>({3, 1, 1, 1, 2, channels_last}, 0, inputs);
        check_gate<T>({0, 8, 4, 4, 2, channels_last}, 0, inputs);
      }
    check_gate<T>({1, 1, 2, 700, 2, false}, 0, Inputs::random);
    check_gate<T>({40, 3, 40, 2, 2, false}, 0, Inputs::random);
  });
  begin_case("float64");
  EXPECT(ran::cuda::attention_gate_forward(nullptr, nullptr, nullptr, ran::DType::f64, {1, 1, 1, 1, 1, false},
                                           nullptr) == cudaErrorInvalidValue);
  finish("attention_gate");
}
