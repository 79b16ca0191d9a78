// The tensors of an attention gate, with whatever up-sampling, and its two passes in every schedule.
#pragma once

#include "check.h"

namespace check {

template <typename T>
struct GateCase {
  const ran::GateShape s;
  const size_t high = s.numel(), low = s.n * s.c * s.mask_h() * s.mask_w();
  const Layout at{s.c, s.h, s.w, s.channels_last}, low_at{s.c, s.mask_h(), s.mask_w(), s.channels_last};
  emu::Buffer<T> out, dtrunk, dmask, trunk, dout, mask;

  // Random, and with `whole` trunk and dout of whole numbers.
  GateCase(const ran::GateShape& shape, size_t shift, bool whole)
      : s(shape),
        out(high, shift),
        dtrunk(high, shift),
        dmask(low, shift),
        trunk(high, shift),
        dout(high, shift),
        mask(low, shift) {
    fill(trunk, -4, 4, whole);
    fill(dout, -4, 4, whole);
    fill(mask, -6, 6);
  }

  void add_nan() {
    if (low) mask[low / 2] = make<T>(NAN), trunk[high / 3] = make<T>(INFINITY);
  }

  template <typename Forward, typename Backward>
  void run(Forward&& forward, Backward&& backward) {
    const auto p = [](const auto& b) { return static_cast<void*>(b.data()); };
    const ran::DType dtype = Type<T>::dtype;
    run_schedules([&] { return forward(p(out), p(trunk), p(mask), dtype, s, nullptr); }, out);
    run_schedules([&] { return backward(p(dtrunk), p(dmask), p(dout), p(trunk), p(mask), dtype, s, nullptr); }, dtrunk,
                  dmask);
  }

  // Calls body(n, c, y, x) for every value of the trunk.
  template <typename Body>
  void for_each_value(Body&& body) const {
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c; ++c)
        for (int64_t y = 0; y < s.h; ++y)
          for (int64_t x = 0; x < s.w; ++x) body(n, c, y, x);
  }
};

}  // namespace check
