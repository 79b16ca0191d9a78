// The attention gate (1 + sigmoid(mask)) * trunk, forward and backward, with nearest up-sampling of the mask fused in.
#include <algorithm>
#include <vector>

#include "../math.h"
#include "parallel.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // values that are worth a thread

// exp to within 1 ulp: 2^k * p(r), with x = k ln 2 + r and ln 2 in two parts (Cody and Waite 1980). NaN stays NaN; the
// ends are clamped where the result would leave the normal range, which sigmoid cannot tell from 0 and 1.
inline Vec<float> exp(Vec<float> x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec<float> shifted = fma(x, splat(1.44269504f), magic);
  const Vec<float> k = shifted - magic;
  Vec<float> r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  Bits32 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // the low bits of `shifted` are k
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename V>
struct Sigmoid {
  V s, complement;  // complement = 1 - s, without the cancellation
  explicit Sigmoid(V mask) {
    const V e = exp(-mask);
    s = 1 / (1 + e);
    complement = e * s;
  }
};

template <typename T, typename A = Acc<T>>
inline void forward_row(T* out, const T* trunk, const T* mask, int64_t size) {
  for_lanes<A>(size, [&](int64_t i, int n) {
    const Vec<A> t = load(trunk + i, n);
    store(out + i, fma(Sigmoid<Vec<A>>(load(mask + i, n)).s, t, t), n);
  });
}

// Rows of one pixel (channels_last) or one image row (NCHW), for which `mask_row` gives the mask's values.
template <typename T>
void forward_scaled(T* out, const T* trunk, const T* mask, GateShape g) {
  const int64_t images = g.channels_last ? g.n : g.n * g.c, width = g.channels_last ? g.c : 1;
  parallel_for(0, images * g.h, std::max<int64_t>(1, kGrain / (g.w * width)), [&](int64_t begin, int64_t end) {
    std::vector<T> wide(size_t(g.w * width));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / g.h, y = row % g.h;
      const T* const source = mask + (image * g.mask_h() + y / g.scale) * g.mask_w() * width;
      for (int64_t x = 0; x < g.w; ++x) std::copy_n(source + x / g.scale * width, width, wide.data() + x * width);
      forward_row(out + row * g.w * width, trunk + row * g.w * width, wide.data(), g.w * width);
    }
  });
}

template <typename T, typename A = Acc<T>>
void backward_flat(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, int64_t size) {
  parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    for_lanes<A>(end - begin, [&](int64_t i, int n) {
      const int64_t at = begin + i;
      const Vec<A> g = load(dout + at, n), t = load(trunk + at, n);
      const Sigmoid<Vec<A>> gate(load(mask + at, n));
      store(dtrunk + at, fma(gate.s, g, g), n);
      store(dmask + at, g * t * gate.s * gate.complement, n);
    });
  });
}

// One row of the mask: every image row that it is read by adds its dout * trunk, then the gate's slope is applied once.
template <typename T, typename A = Acc<T>>
void backward_scaled(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, GateShape g) {
  const int64_t images = g.channels_last ? g.n : g.n * g.c, width = g.channels_last ? g.c : 1;
  const int64_t row_size = g.w * width, mask_size = g.mask_w() * width;
  parallel_for(0, images * g.mask_h(), std::max<int64_t>(1, kGrain / (row_size * g.scale)),
               [&](int64_t begin, int64_t end) {
                 std::vector<A> s(size_t(mask_size), A(0)), slope(s), sums(s), wide(static_cast<size_t>(row_size)),
                     product(wide);
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t image = row / g.mask_h(), top = row % g.mask_h() * g.scale;
                   for_lanes<A>(mask_size, [&](int64_t i, int n) {
                     const Sigmoid<Vec<A>> gate(load(mask + row * mask_size + i, n));
                     store(s.data() + i, gate.s, n);
                     store(slope.data() + i, gate.s * gate.complement, n);
                   });
                   std::fill(sums.begin(), sums.end(), A(0));
                   for (int64_t x = 0; x < g.w; ++x)
                     std::copy_n(s.data() + x / g.scale * width, width, wide.data() + x * width);
                   for (int64_t y = top; y < std::min(top + g.scale, g.h); ++y) {
                     const int64_t at = (image * g.h + y) * row_size;
                     for_lanes<A>(row_size, [&](int64_t i, int n) {
                       const Vec<A> d = load(dout + at + i, n);
                       store(dtrunk + at + i, fma(load(wide.data() + i, n), d, d), n);
                       store(product.data() + i, d * load(trunk + at + i, n), n);
                     });
                     for (int64_t x = 0; x < g.w; ++x)
                       for (int64_t c = 0; c < width; ++c) sums[x / g.scale * width + c] += product[x * width + c];
                   }
                   for_lanes<A>(mask_size, [&](int64_t i, int n) {
                     store(dmask + row * mask_size + i, load(sums.data() + i, n) * load(slope.data() + i, n), n);
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
    if (g.scale != 1) return forward_scaled(o, tr, m, g);
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
    if (g.scale != 1) return backward_scaled(dt, dm, d, tr, m, g);
    backward_flat(dt, dm, d, tr, m, g.numel());
  });
}

}  // namespace ran::cpu::RAN_ISA
