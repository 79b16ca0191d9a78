// Bilinear up-sampling along one axis, for the host and the device. No torch here.
#pragma once

#include "formulas.h"

namespace ran {

// Where a coordinate of the high resolution lies between two of the low one.
template <typename T, typename Index>
struct Stencil {
  Index low0, low1;  // neighbours, or twice the last one
  T weight0, weight1;
};

// That of torch's interpolate(mode="bilinear", align_corners=False) for coordinate x of the high resolution: source is
// ratio * (x + 1/2) - 1/2, ratio = low / high. What rounds, here a double to float, is torch's as well: by that a
// coordinate that falls on a low one has the same neighbours, to which NaN spreads at weight 0, too.
template <typename T, typename Index>
RAN_HD Stencil<T, Index> stencil(T source, Index low) {
  const T place = source > T(0) ? source : T(0);
  const Index floor = Index(float(place)), low0 = floor < low - 1 ? floor : low - 1;
  const T above = place - T(low0), weight1 = above < T(0) ? T(0) : above < T(1) ? above : T(1);
  return {low0, low0 < low - 1 ? low0 + 1 : low0, T(1) - weight1, weight1};
}

}  // namespace ran
