// The attention gate (1 + sigmoid(mask)) * trunk, forward and backward, with nearest up-sampling of the mask fused in.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "sigmoid.h"
#include "wide_sum.h"

namespace ran::cpu::RAN_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // values that are worth a thread

template <typename T, typename A = Acc<T>>
inline void forward_row(T* out, const T* trunk, const T* mask, int64_t size) {
  for_lanes<A>(size, [&](int64_t i, int n) {
    const Vec<A> t = load(trunk + i, n);
    store(out + i, fma(Sigmoid<T>(load(mask + i, n)).s, t, t), n);
  });
}

// Runs body(mask pixel, its trunk pixels' offsets, how many) for the channels_last mask's pixels: each gates a scale x
// scale square of the trunk, cut at the border.
template <typename Body>
void for_mask_pixels(GateShape g, Body&& body) {
  const int64_t high = std::min(g.scale, g.h), wide = std::min(g.scale, g.w);  // of a square
  const int64_t grain = std::max<int64_t>(1, kGrain / (g.w * g.c * high));
  parallel_for(0, g.n * g.mask_h(), grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> square(size_t(high * wide));
    for (int64_t row = begin; row < end; ++row)
      for (int64_t mx = 0; mx < g.mask_w(); ++mx) {
        const int64_t image = row / g.mask_h(), top = row % g.mask_h() * g.scale, left = mx * g.scale;
        int64_t count = 0;
        for (int64_t y = top; y < std::min(top + high, g.h); ++y)
          for (int64_t x = left; x < std::min(left + wide, g.w); ++x)
            square[count++] = ((image * g.h + y) * g.w + x) * g.c;
        body((row * g.mask_w() + mx) * g.c, square.data(), count);
      }
  });
}

template <typename T, typename A = Acc<T>>
void forward_scaled_last(T* out, const T* trunk, const T* mask, GateShape g) {
  for_mask_pixels(g, [&](int64_t at, const int64_t* square, int64_t count) {
    for_lanes<A>(g.c, [&](int64_t c, int n) {
      const Vec<A> s = Sigmoid<T>(load(mask + at + c, n)).s;
      for (int64_t i = 0; i < count; ++i) {
        const Vec<A> t = load(trunk + square[i] + c, n);
        store(out + square[i] + c, fma(s, t, t), n);
      }
    });
  });
}

template <typename T, typename A = Acc<T>>
void backward_scaled_last(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, GateShape g) {
  for_mask_pixels(g, [&](int64_t at, const int64_t* square, int64_t count) {
    for_lanes<A>(g.c, [&](int64_t c, int n) {
      const Vec<A> logits = load(mask + at + c, n);
      const Sigmoid<T> gate(logits);
      constexpr int64_t kShort = 16;  // terms of a sum in the accumulators' precision
      WideSum<A> total;
      Vec<A> product{};
      for (int64_t i = 0; i < count; ++i) {
        const Vec<A> d = load(dout + square[i] + c, n);
        store(dtrunk + square[i] + c, fma(gate.s, d, d), n);
        product = fma(d, load(trunk + square[i] + c, n), product);
        if ((i + 1) % kShort == 0) total += product, product = Vec<A>{};
      }
      if (count >= kShort) total += product, product = total.rounded();
      store(dmask + at + c, gate.gradient(product, logits), n);
    });
  });
}

// NCHW: one image row at a time, the mask's row stretched to its width first.
template <typename T>
void forward_scaled_rows(T* out, const T* trunk, const T* mask, GateShape g) {
  parallel_for(0, g.n * g.c * g.h, std::max<int64_t>(1, kGrain / g.w), [&](int64_t begin, int64_t end) {
    std::vector<T> wide(static_cast<size_t>(g.w));
    for (int64_t row = begin; row < end; ++row) {
      const T* const source = mask + (row / g.h * g.mask_h() + row % g.h / g.scale) * g.mask_w();
      for (int64_t x = 0; x < g.w; ++x) wide[x] = source[x / g.scale];
      forward_row(out + row * g.w, trunk + row * g.w, wide.data(), g.w);
    }
  });
}

template <typename T, typename A = Acc<T>>
void backward_flat(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, int64_t size) {
  parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    for_lanes<A>(end - begin, [&](int64_t i, int n) {
      const int64_t at = begin + i;
      const Vec<A> g = load(dout + at, n), product = g * load(trunk + at, n), logits = load(mask + at, n);
      const Sigmoid<T> gate(logits);
      store(dtrunk + at, fma(gate.s, g, g), n);
      store(dmask + at, gate.gradient(product, logits), n);
    });
  });
}

// One row of the NCHW mask: every image row that it gates adds its dout * trunk, then the gate's slope is applied once.
template <typename T, typename A = Acc<T>>
void backward_scaled_rows(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, GateShape g) {
  const int64_t high = std::min(g.scale, g.h), grain = std::max<int64_t>(1, kGrain / (g.w * high));
  parallel_for(0, g.n * g.c * g.mask_h(), grain, [&](int64_t begin, int64_t end) {
    std::vector<A> s(static_cast<size_t>(g.mask_w())), totals(s), wide(static_cast<size_t>(g.w)), product(wide);
    std::vector<double> sums(s.size());  // of up to scale x scale values each
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / g.mask_h(), top = row % g.mask_h() * g.scale, first = row * g.mask_w();
      for_lanes<A>(g.mask_w(),
                   [&](int64_t i, int n) { store(s.data() + i, Sigmoid<T>(load(mask + first + i, n)).s, n); });
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t x = 0; x < g.w; ++x) wide[x] = s[x / g.scale];
      for (int64_t y = top; y < std::min(top + high, g.h); ++y) {
        const int64_t at = (plane * g.h + y) * g.w;
        for_lanes<A>(g.w, [&](int64_t i, int n) {
          const Vec<A> d = load(dout + at + i, n);
          store(dtrunk + at + i, fma(load(wide.data() + i, n), d, d), n);
          store(product.data() + i, d * load(trunk + at + i, n), n);
        });
        for (int64_t x = 0; x < g.w; ++x) sums[x / g.scale] += double(product[x]);
      }
      std::copy(sums.begin(), sums.end(), totals.begin());
      for_lanes<A>(g.mask_w(), [&](int64_t i, int n) {
        const Vec<A> logits = load(mask + first + i, n), total = load(totals.data() + i, n);
        store(dmask + first + i, Sigmoid<T>(logits).gradient(total, logits), n);
      });
    }
  });
}

}  // namespace

void attention_gate_forward(void* out, const void* trunk, const void* mask, DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    T* const o = static_cast<T*>(out);
    const T *const tr = static_cast<const T*>(trunk), *const m = static_cast<const T*>(mask);
    if (g.scale != 1) return g.channels_last ? forward_scaled_last(o, tr, m, g) : forward_scaled_rows(o, tr, m, g);
    parallel_for(0, g.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { forward_row(o + begin, tr + begin, m + begin, end - begin); });
  });
}

void attention_gate_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask,
                             DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    T *const dt = static_cast<T*>(dtrunk), *const dm = static_cast<T*>(dmask);
    const T* const d = static_cast<const T*>(dout);
    const T *const tr = static_cast<const T*>(trunk), *const m = static_cast<const T*>(mask);
    if (g.scale != 1)
      return g.channels_last ? backward_scaled_last(dt, dm, d, tr, m, g) : backward_scaled_rows(dt, dm, d, tr, m, g);
    backward_flat(dt, dm, d, tr, m, g.numel());
  });
}

}  // namespace ran::cpu::RAN_ISA
