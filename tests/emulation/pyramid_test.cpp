// upsample_add_{forward,backward} and max_pool_{forward,backward} against double.
#include "../../csrc/cuda/max_pool.cu"
#include "../../csrc/cuda/upsample_add.cu"
#include "check.h"

using namespace check;
using emu::Buffer;

template <typename T>
void check_upsample(const ran::GateShape& s, size_t shift, bool with_skip) {
  begin_case("upsample_add %s %ldx%ldx%ldx%ld scale %ld %s shift %zu skip %d", Type<T>::name, s.n, s.c, s.h, s.w,
             s.scale, s.channels_last ? "channels_last" : "contiguous", shift, with_skip);
  const size_t high = s.numel(), low = s.n * s.c * s.mask_h() * s.mask_w();
  Buffer<T> out(high, shift), lower(low, shift), skip(high, shift), dlower(low, shift);
  fill(lower, -9, 9, true);
  fill(skip, -9, 9, true);
  const auto p = [](const auto& b) { return static_cast<void*>(b.data()); };
  run_schedules(
      [&] {
        return ran::cuda::upsample_add_forward(p(out), p(lower), with_skip ? p(skip) : nullptr, Type<T>::dtype, s,
                                               nullptr);
      },
      out);
  run_schedules([&] { return ran::cuda::upsample_add_backward(p(dlower), p(skip), Type<T>::dtype, s, nullptr); },
                dlower);
  const Layout at{s.c, s.h, s.w, s.channels_last}, low_at{s.c, s.mask_h(), s.mask_w(), s.channels_last};
  std::vector<double> sums(low, 0.0);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t y = 0; y < s.h; ++y)
        for (int64_t x = 0; x < s.w; ++x) {
          const int64_t i = at(n, c, y, x), j = low_at(n, c, y / s.scale, x / s.scale);
          expect_equal("out", out, i, value(lower[j]) + (with_skip ? value(skip[i]) : 0));
          sums[j] += value(skip[i]);
        }
  for (size_t j = 0; j < low; ++j) expect_equal("dlower", dlower, j, sums[j]);
}

template <typename T>
void check_pool(const ran::GateShape& s, size_t shift, bool nan) {
  begin_case("max_pool %s %ldx%ldx%ldx%ld %s shift %zu nan %d", Type<T>::name, s.n, s.c, s.h, s.w,
             s.channels_last ? "channels_last" : "contiguous", shift, nan);
  const size_t high = s.numel(), low = s.n * s.c * s.mask_h() * s.mask_w();
  Buffer<T> x(high, shift), out(low, shift), dout(low, shift), dx(high, shift);
  Buffer<uint8_t> index(low, shift);
  fill(x, -3, 3, true);  // whole numbers: many equal ones
  fill(dout, -9, 9, true);
  if (nan)
    for (size_t i = 0; i < high; i += 5) x[i] = make<T>(i % 3 ? NAN : -INFINITY);
  const auto p = [](const auto& b) { return static_cast<void*>(b.data()); };
  run_schedules([&] { return ran::cuda::max_pool_forward(p(out), index.data(), p(x), Type<T>::dtype, s, nullptr); },
                out, index);
  run_schedules([&] { return ran::cuda::max_pool_backward(p(dx), p(dout), index.data(), Type<T>::dtype, s, nullptr); },
                dx);
  const Layout at{s.c, s.h, s.w, s.channels_last}, low_at{s.c, s.mask_h(), s.mask_w(), s.channels_last};
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t y = 0; y < s.mask_h(); ++y)
        for (int64_t x0 = 0; x0 < s.mask_w(); ++x0) {
          double best = -INFINITY;
          int chosen = 0;
          const auto inside = [&](int k) { return 2 * y + k / 2 < s.h && 2 * x0 + k % 2 < s.w; };
          for (int k = 0; k < 4; ++k)
            if (inside(k)) {
              const double v = value(x[at(n, c, 2 * y + k / 2, 2 * x0 + k % 2)]);
              if (v > best || v != v) best = v, chosen = k;
            }
          const int64_t j = low_at(n, c, y, x0);
          expect_equal("out", out, j, best);
          if (index[j] != chosen) mismatch("index[%ld] is %d, not %d", j, index[j], chosen);
          for (int k = 0; k < 4; ++k)
            if (inside(k))
              expect_equal("dx", dx, at(n, c, 2 * y + k / 2, 2 * x0 + k % 2), k == chosen ? value(dout[j]) : 0);
        }
}

int main() {
  for_each_type([](auto type) {
    using T = decltype(type);
    for (const bool channels_last : {false, true})
      for (const bool option : {false, true}) {
        const ran::GateShape shapes[] = {{2, 16, 5, 7, 2, channels_last},  {1, 72, 4, 4, 2, channels_last},
                                         {2, 3, 6, 1, 2, channels_last},   {3, 1, 1, 1, 2, channels_last},
                                         {0, 8, 4, 4, 2, channels_last},   {1, 8, 2, 300, 2, channels_last},
                                         {1, 264, 3, 3, 2, channels_last}, {20, 2, 30, 2, 2, channels_last}};
        for (const auto& s : shapes) check_upsample<T>(s, 0, option), check_pool<T>(s, 0, option);
        check_upsample<T>({1, 8, 7, 8, 3, channels_last}, 0, option);
        check_upsample<T>({1, 8, 3, 3, 2, channels_last}, 1, option);
        check_pool<T>({1, 8, 3, 3, 2, channels_last}, 1, option);
      }
  });
  begin_case("a scale other than 2");
  EXPECT(ran::cuda::max_pool_forward(nullptr, nullptr, nullptr, ran::DType::f32, {1, 1, 3, 3, 3, false}, nullptr) ==
         cudaErrorInvalidValue);
  finish("pyramid");
}
