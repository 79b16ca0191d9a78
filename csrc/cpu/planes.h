// Two resolutions of one activation, the low one half the high one, rounded up: to every low pixel belongs a 2x2 window
// of high ones, cut off at the border. NCHW is n * c planes of one value a pixel, channels_last n planes of c values.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/types.h"
#include "parallel.h"

namespace ran::cpu::RAN_ISA {

// Low rows [begin, end), counted through all planes, and the high rows of their windows, which follow one another in
// memory. Both are walked in its order: window by window, what is in no cache yet takes twice as long to read.
struct RowBlock {
  GateShape g;
  int64_t begin, end;

  int64_t inner() const { return g.channels_last ? g.c : 1; }
  int64_t high_row(int64_t row) const { return row / g.mask_h() * g.h + row % g.mask_h() * 2; }
  int64_t low() const { return begin * g.mask_w() * inner(); }  // offset of the first value
  int64_t low_size() const { return (end - begin) * g.mask_w() * inner(); }
  int64_t high() const { return high_row(begin) * g.w * inner(); }
  int64_t high_size() const { return (high_row(end) - high_row(begin)) * g.w * inner(); }

  // Runs body(high, low, position) for every high pixel: the offsets, from the block's own, of its first value and of
  // its low pixel's; and 0 .. 3, its place in the window, row by row.
  template <typename Body>
  void for_pixels(Body&& body) const {
    const int64_t width = inner();
    int64_t high = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t low = (row - begin) * g.mask_w(), height = std::min<int64_t>(2, g.h - row % g.mask_h() * 2);
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < g.w; ++x, high += width) body(high, (low + x / 2) * width, int(2 * y + x % 2));
    }
  }
};

// Runs body(RowBlock) for blocks that cover all rows.
template <typename Body>
void for_row_blocks(GateShape g, Body&& body) {
  constexpr int64_t size = 2048, grain = 4;  // values of a block, to stay in the first-level cache; blocks a thread
  const int64_t rows = (g.channels_last ? g.n : g.n * g.c) * g.mask_h();
  const int64_t step = std::max<int64_t>(1, size / (2 * g.w * (g.channels_last ? g.c : 1)));
  parallel_for(0, (rows + step - 1) / step, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(RowBlock{g, i * step, std::min((i + 1) * step, rows)});
  });
}

}  // namespace ran::cpu::RAN_ISA
