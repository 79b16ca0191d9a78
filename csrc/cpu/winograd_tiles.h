// The tiles of a 3x3 convolution's output (stride 1, padding 1, channels_last) and their transforms to and from points.
// Tensors may hold any dtype; points are float.
#pragma once

#include "caches.h"
#include "kernels.h"
#include "winograd_products.h"

namespace ran::cpu::RAN_ISA {

// A tile's place in the output: its first pixel, and how many of its pixels are inside.
struct Place {
  int64_t image, y, x;
  int rows, columns;
  int pixels() const { return rows * columns; }
};

// m x m tiles, row by row; those at the lower and right border may reach beyond.
template <int m>
struct TileGrid {
  int64_t height, width, high, wide, count;

  explicit TileGrid(const ConvShape& s)
      : height(s.h), width(s.w), high((s.h + m - 1) / m), wide((s.w + m - 1) / m), count(s.n * high * wide) {}
  Place at(int64_t tile) const {
    const int64_t row = tile / wide, y = row % high * m, x = (tile - row * wide) * m;
    return {row / high, y, x, int(std::min<int64_t>(m, height - y)), int(std::min<int64_t>(m, width - x))};
  }
};

// The kSide x kSide pixels from (y, x) on. One outside is read at the border and then masked.
template <int kSide, typename T>
struct Window {
  const T* row[kSide];
  int64_t column[kSide];
  uint32_t inside[kSide][kSide];  // all bits, or none; not set where the window is whole
  bool whole;

  Window(const T* image, int64_t height, int64_t width, int64_t channels, int64_t y, int64_t x)
      : whole(y >= 0 && x >= 0 && y + kSide <= height && x + kSide <= width) {
    for (int i = 0; i < kSide; ++i) {
      row[i] = image + std::clamp<int64_t>(y + i, 0, height - 1) * width * channels;
      column[i] = std::clamp<int64_t>(x + i, 0, width - 1) * channels;
    }
    if (whole) return;
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j)
        inside[i][j] = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width ? ~0u : 0u;
  }
  const T* at(int i, int j) const { return row[i] + column[j]; }
};

inline Vec<float> keep(Vec<float> v, uint32_t bits) {
  Bits32 lanes;
  std::memcpy(&lanes, &v, sizeof lanes);
  lanes &= bits;
  std::memcpy(&v, &lanes, sizeof v);
  return v;
}

// The 36 or 16 points of an n x n window's channels [c, c + lanes): transform(points, values) along one axis, kIn
// values each; point i goes to `to + i * step`.
template <int kIn, int kPoints, bool kWhole, typename T, typename Transform, typename Activate>
RAN_INLINE void points_of(float* to, int64_t step, const Window<kIn, T>& window, int64_t c, int lanes,
                          Transform&& transform, Activate&& activate) {
  Vec<float> half[kPoints][kIn], values[kIn], points[kPoints];
  RAN_UNROLL for (int j = 0; j < kIn; ++j) {
    RAN_UNROLL for (int i = 0; i < kIn; ++i) {
      values[i] = activate(load(window.at(i, j) + c, lanes));
      if (!kWhole) values[i] = keep(values[i], window.inside[i][j]);
    }
    transform(points, values);
    RAN_UNROLL for (int i = 0; i < kPoints; ++i) half[i][j] = points[i];
  }
  for (int i = 0; i < kPoints; ++i) {
    transform(points, half[i]);
    RAN_UNROLL for (int j = 0; j < kPoints; ++j) store(to + j * step, points[j]);
    to += kPoints * step;
  }
}

// An activation that is none.
struct AsItIs {
  auto at(int64_t, int) const {
    return [](Vec<float> v) { return v; };
  }
};

// relu(v * scale + shift); lanes past the last channel stay 0.
struct ScaleShiftRelu {
  const float *scale, *shift;
  auto at(int64_t c, int lanes) const {
    return [k = load(scale + c, lanes), b = load(shift + c, lanes)](Vec<float> v) { return relu(fma(v, k, b)); };
  }
};

// The points of an input tile's channels [c, c + channels); to(channel - c) is where those of a vector go.
template <class F, typename T, typename Activate, typename To>
RAN_INLINE void input_points(const T* x, const ConvShape& s, int64_t all_channels, const Place& place, int64_t c,
                             int64_t channels, int64_t step, const Activate& activate, To&& to) {
  const Window<F::n, T> window(x + place.image * s.h * s.w * all_channels, s.h, s.w, all_channels, place.y - 1,
                               place.x - 1);
  const auto run = [&](auto whole) {
    for_lanes<float>(channels, [&](int64_t i, int lanes) {
      points_of<F::n, F::n, decltype(whole)::value>(
          to(i), step, window, c + i, lanes, [](auto* points, auto* values) { F::input(points, values); },
          activate.at(c + i, lanes));
    });
  };
  window.whole ? run(std::true_type()) : run(std::false_type());
}

// The m x m outputs of a tile's points, `step` apart from `points` on.
template <class F>
inline void outputs_of(Vec<float> (&y)[F::m][F::m], const float* points, int64_t step) {
  Vec<float> half[F::m][F::n], column[F::n], out[F::m];
  RAN_UNROLL for (int j = 0; j < F::n; ++j) {
    RAN_UNROLL for (int i = 0; i < F::n; ++i) column[i] = load(points + (i * F::n + j) * step);
    F::output(out, column);
    RAN_UNROLL for (int i = 0; i < F::m; ++i) half[i][j] = out[i];
  }
  RAN_UNROLL for (int i = 0; i < F::m; ++i) F::output(y[i], half[i]);
}

// body(i, j) for the pixels of an m x m tile that are inside; of a whole one, whose sizes are constants, unrolled.
template <int m, typename Body>
inline void for_pixels(const Place& place, Body&& body) {
  if (place.pixels() == m * m) {
    RAN_UNROLL for (int i = 0; i < m; ++i) { RAN_UNROLL for (int j = 0; j < m; ++j) body(i, j); }
    return;
  }
  for (int i = 0; i < place.rows; ++i)
    for (int j = 0; j < place.columns; ++j) body(i, j);
}

// A tensor whose pixels at a tile's place, moved by `offset` along both axes, are used soon.
template <typename T>
struct Touched {
  const T* data;
  int64_t channels, used, offset;  // `used` of the channels, from `data` on
};

// Asks the cache for part `part` of `parts` of the pixels of tiles [begin, end): waiting for them, the transforms take
// three times as long.
template <bool kWrite, int m, typename T>
inline void prefetch_tiles(const Touched<T>& t, const TileGrid<m>& grid, int64_t begin, int64_t end, int64_t part,
                           int64_t parts) {
  const int64_t rows = (std::min(end, grid.count) - begin) * m;  // none or less where `begin` is past the end
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    const Place at = grid.at(begin + row / m);
    const int64_t y = at.y + row % m + t.offset, x = at.x + t.offset;
    if (y >= grid.height) continue;
    const T* const pixel = t.data + ((at.image * grid.height + y) * grid.width + x) * t.channels;
    for (int64_t j = 0; j < std::min<int64_t>(m, grid.width - x); ++j)
      for (int64_t c = 0; c < t.used; c += 64 / int64_t(sizeof(T))) prefetch_line<kWrite>(pixel + j * t.channels + c);
  }
}

}  // namespace ran::cpu::RAN_ISA
