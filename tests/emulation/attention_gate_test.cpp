// attention_gate_{forward,backward} against double.
#include "../../csrc/cuda/attention_gate.cu"

#include "check.h"

using namespace check;
using emu::Buffer;

enum class Inputs { random, whole, nan };

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <typename T>
void check_gate(const ran::GateShape& s, size_t shift, Inputs inputs) {
  begin_case("attention_gate %s %ldx%ldx%ldx%ld scale %ld %s shift %zu inputs %d", Type<T>::name, s.n, s.c, s.h, s.w,
             s.scale, s.channels_last ? "channels_last" : "contiguous", shift, static_cast<int>(inputs));
  const size_t high = s.numel(), low = s.n * s.c * s.mask_h() * s.mask_w();
  Buffer<T> out(high, shift), dtrunk(high, shift), dmask(low, shift), trunk(high, shift), dout(high, shift),
      mask(low, shift);
  const bool whole = inputs == Inputs::whole;
  fill(trunk, -4, 4, whole);
  fill(dout, -4, 4, whole);
  fill(mask, -6, 6);
  // The sigmoid is exactly 1/2, 1 or 0.
  if (whole)
    for (size_t i = 0; i < low; ++i) mask[i] = make<T>(200.0 * (static_cast<int>(random_bits() % 3) - 1));
  if (inputs == Inputs::nan && low) mask[low / 2] = make<T>(NAN), trunk[high / 3] = make<T>(INFINITY);
  const auto p = [](const auto& b) { return static_cast<void*>(b.data()); };
  run_schedules(
      [&] { return ran::cuda::attention_gate_forward(p(out), p(trunk), p(mask), Type<T>::dtype, s, nullptr); }, out);
  run_schedules(
      [&] {
        return ran::cuda::attention_gate_backward(p(dtrunk), p(dmask), p(dout), p(trunk), p(mask), Type<T>::dtype, s,
                                                  nullptr);
      },
      dtrunk, dmask);
  const Layout at{s.c, s.h, s.w, s.channels_last}, low_at{s.c, s.mask_h(), s.mask_w(), s.channels_last};
  std::vector<double> sums(low, 0.0), sizes(low, 0.0);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t y = 0; y < s.h; ++y)
        for (int64_t x = 0; x < s.w; ++x) {
          const int64_t i = at(n, c, y, x), j = low_at(n, c, y / s.scale, x / s.scale);
          const double t = value(trunk[i]), d = value(dout[i]), g = sigmoid(value(mask[j]));
          if (whole) {
            expect_equal("out", out, i, (1 + g) * t);
            expect_equal("dtrunk", dtrunk, i, (1 + g) * d);
          } else {
            expect_close("out", out, i, (1 + g) * t, 2 * t);
            expect_close("dtrunk", dtrunk, i, (1 + g) * d, 2 * d);
          }
          sums[j] += d * t * g * (1 - g);
          sizes[j] += std::fabs(d * t * g);
        }
  for (size_t j = 0; j < low; ++j)
    if (whole)
      expect_equal("dmask", dmask, j, sums[j]);
    else
      expect_close("dmask", dmask, j, sums[j], sizes[j]);
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
