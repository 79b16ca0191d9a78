// The matrix products between Winograd's transforms: a register tile of kTileRows x two vectors, for 256- and 512-bit
// vectors. Sums are taken in runs of 16 terms that are then added to the total in memory: a longer run rounds more.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "vec.h"
#include "winograd_points.h"

namespace ran::cpu::RAN_ISA {

constexpr int kRun = 16;                          // terms of a sum that stays in registers
constexpr int kPanel = 2 * kLanes;                // columns of a register tile
constexpr int kTileRows = kBytes == 64 ? 14 : 6;  // with two vectors each, they fill 32 or 16 registers
constexpr int64_t kStep = 4;                      // terms are a multiple of it, filled up with zeros

// From one point's `count` values to the next one's: points a power of two apart would meet in one set of the cache.
constexpr int64_t apart(int64_t count) { return round_up(count, 16) + 16; }

// Columns [column, column + width) of `columns`, which is a multiple of kLanes: a panel of two vectors, the last
// perhaps of one.
constexpr int64_t panel_width(int64_t column, int64_t columns) { return std::min<int64_t>(kPanel, columns - column); }

// Between the products of one row of a register tile and the next: else GCC loads many factors ahead, and then lacks
// registers for the sums.
template <int kVectors>
RAN_INLINE void keep_order(Vec<float> (&sum)[kVectors]) {
#if defined(RAN_AVX512)
  RAN_UNROLL for (int v = 0; v < kVectors; ++v) asm volatile("" : "+v"(sum[v]));
#endif
}

// m[row][column] += (add) or = the sum over `terms` of a(row, term) * b[term][column], for kRows rows and kVectors
// vectors of columns, side by side in m and b.
// a(row, term) is a[row * kRun + term], each run `a_step` after the last; or, kByTerm, a[term * a_step + row].
template <int kRows, int kVectors, bool kByTerm>
void multiply_tile(float* m, const float* a, int64_t a_step, const float* b, int64_t terms, bool add) {
  constexpr int kWidth = kVectors * kLanes;
  for (int64_t done = 0; done < terms; done += kRun) {
    Vec<float> sum[kRows][kVectors];
    RAN_UNROLL for (int r = 0; r < kRows; ++r) {
      RAN_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<float>{};
    }
    const int64_t length = std::min<int64_t>(kRun, terms - done);
    const float* term = a;
    for (int64_t t = 0; t < length; t += kStep) {
      RAN_UNROLL for (int i = 0; i < kStep; ++i) {
        Vec<float> column[kVectors];
        RAN_UNROLL for (int v = 0; v < kVectors; ++v) column[v] = load(b + i * kWidth + v * kLanes);
        RAN_UNROLL for (int r = 0; r < kRows; ++r) {
          const Vec<float> factor = splat(kByTerm ? term[r] : term[r * kRun + i]);
          RAN_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(factor, column[v], sum[r][v]);
          keep_order(sum[r]);
        }
        if (kByTerm) term += a_step;
      }
      if (!kByTerm) term += kStep;
      b += kStep * kWidth;
    }
    a = kByTerm ? term : a + a_step;
    RAN_UNROLL for (int r = 0; r < kRows; ++r) {
      RAN_UNROLL for (int v = 0; v < kVectors; ++v) {
        float* const to = m + r * kWidth + v * kLanes;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      }
    }
    add = true;
  }
}

using MultiplyTile = void (*)(float*, const float*, int64_t, const float*, int64_t, bool);

template <int kVectors, bool kByTerm, int... kLess>
constexpr std::array<MultiplyTile, sizeof...(kLess)> tiles_of(std::integer_sequence<int, kLess...>) {
  return {multiply_tile<kLess + 1, kVectors, kByTerm>...};
}

// The same for any number of rows and a panel of `width` columns. Rows are split evenly: a tile of few rows would leave
// the multipliers waiting.
template <bool kByTerm>
inline void multiply_panel(float* m, const float* a, int64_t a_step, const float* b, int64_t rows, int64_t width,
                           int64_t terms, bool add) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  static constexpr std::array<MultiplyTile, kTileRows> kWhole = tiles_of<2, kByTerm>(Rows()),
                                                       kHalf = tiles_of<1, kByTerm>(Rows());
  for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t take = (rows + tiles - 1) / tiles;
    (width == kPanel ? kWhole : kHalf)[size_t(take - 1)](m, a, a_step, b, terms, add);
    m += take * width;
    a += take * (kByTerm ? 1 : kRun);
    rows -= take;
  }
}

}  // namespace ran::cpu::RAN_ISA
