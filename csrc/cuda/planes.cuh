// Two resolutions of one activation: a low one, and a high one in which every low position is a scale x scale window
// (cut off at the border). Gate, up-sampling and pooling all walk the windows, in NCHW and channels_last alike; each
// thread owns a window, so that sums over it need no atomics.
#pragma once

#include "vec.cuh"

namespace ran::cuda {

// NCHW is n * c planes of one value a pixel, channels_last n planes of c values.
struct Planes {
  int64_t planes;
  int h, w, low_h, low_w, inner, scale;

  explicit Planes(const GateShape& s)
      : planes(s.channels_last ? s.n : s.n * s.c),
        h(static_cast<int>(s.h)),
        w(static_cast<int>(s.w)),
        low_h(static_cast<int>(s.mask_h())),
        low_w(static_cast<int>(s.mask_w())),
        inner(static_cast<int>(s.channels_last ? s.c : 1)),
        scale(static_cast<int>(s.scale)) {}

  LaunchShape shape(int vector) const { return cells_shape(planes * low_h, int64_t(low_w) * (inner / vector)); }
};

// kScale 0: known at run time only.
template <int kScale>
struct Window {
  int64_t low, high;   // offsets of the first value
  int height, width;   // less than the scale at the border
  int64_t row_stride;  // from one row of the window to the next
  int step;            // from one column to the next
  int scale;

  // body(offset, 0 .. scale^2 - 1, row by row)
  template <typename Body>
  __device__ __forceinline__ void for_each(Body&& body) const {
    const int s = kScale ? kScale : scale;
#pragma unroll(kScale ? kScale : 1)
    for (int i = 0; i < s; ++i) {
#pragma unroll(kScale ? kScale : 1)
      for (int j = 0; j < s; ++j)
        if (i < height && j < width) body(high + i * row_stride + j * step, i * s + j);
    }
  }
};

template <int V, int kScale, typename Body>
__device__ __forceinline__ void for_each_window(const Planes& p, Body&& body) {
  const int vectors = p.inner / V, s = kScale ? kScale : p.scale;
  for_each_cell(p.planes * p.low_h, p.low_w * vectors, [&](int64_t low_row, int column) {
    const auto [plane, low_y] = divide(low_row, p.low_h);
    const int y = low_y * s, low_x = column / vectors, x = low_x * s;
    const int channel = (column - low_x * vectors) * V;
    Window<kScale> window;
    window.low = (low_row * p.low_w + low_x) * p.inner + channel;
    window.high = ((plane * p.h + y) * p.w + x) * p.inner + channel;
    window.height = min(s, p.h - y);
    window.width = min(s, p.w - x);
    window.row_stride = int64_t(p.w) * p.inner;
    window.step = p.inner;
    window.scale = s;
    body(window);
  });
}

// Calls f with constants: the vector width, over a pixel's values or 1; and the scale where it is 2, else 0.
template <typename T, typename F>
cudaError_t with_windows(const Planes& p, bool aligned, F&& f) {
  using One = std::integral_constant<int, 1>;
  if (p.scale != 2) return f(One{}, std::integral_constant<int, 0>{});
  return with_vector<T>(aligned && p.inner % kVector<T> == 0,
                        [&](auto vector) { return f(vector, std::integral_constant<int, 2>{}); });
}

}  // namespace ran::cuda
