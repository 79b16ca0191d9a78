// A 3x3 weight's points, packed as the panels that the products read: [point][column / kPanel][term][kPanel], the last
// panel perhaps of one vector. Columns are the channels that come out, terms those that are summed over.
#pragma once

#include <utility>

#include "winograd_tiles.h"

namespace ran::cpu::RAN_ISA {

// Exchanges the lanes with `step` of row a for those without it of row b.
template <int kStep, int... kLane>
inline void exchange(Vec<float>& a, Vec<float>& b, std::integer_sequence<int, kLane...>) {
  const Vec<float> low = shuffle<(kLane & kStep ? kLanes + kLane - kStep : kLane)...>(a, b);
  b = shuffle<(kLane & kStep ? kLanes + kLane : kLane + kStep)...>(a, b);
  a = low;
}

template <int kStep>
inline void transpose_step(Vec<float> (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
    RAN_UNROLL for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
    }
    transpose_step<2 * kStep>(rows);
  }
}

inline void transpose(Vec<float> (&rows)[kLanes]) { transpose_step<1>(rows); }

// A weight (co, 3, 3, ci) as one of the two passes takes it.
template <typename T>
struct Weight {
  const T* data;
  int64_t co, ci;
  bool turned;  // for the data gradient: by half a turn, and summed over co instead of ci

  int64_t columns() const { return turned ? ci : co; }
  int64_t terms() const { return turned ? co : ci; }
};

// The nine taps of kLanes terms from `term` on, for the columns [column, column + kLanes); zeros past the last.
template <typename T>
inline void load_taps(Vec<float> (&taps)[9][kLanes], const Weight<T>& w, int64_t column, int64_t term) {
  const int columns = int(std::min<int64_t>(kLanes, w.columns() - column));
  const int terms = int(std::min<int64_t>(kLanes, w.terms() - term));
  for (int tap = 0; tap < 9; ++tap) {
    if (w.turned) {
      for (int i = 0; i < kLanes; ++i)
        taps[tap][i] = i < terms ? load(w.data + ((term + i) * 9 + 8 - tap) * w.ci + column, columns) : Vec<float>{};
    } else {
      Vec<float> rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = i < columns ? load(w.data + ((column + i) * 9 + tap) * w.ci + term, terms) : Vec<float>{};
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) taps[tap][i] = rows[i];
    }
  }
}

// One panel's terms [begin, end), from `to` on; a point's are `step` from the last one's. `end` may reach past the last
// term, up to a multiple of kStep.
template <class F, typename T>
inline void pack_panel(float* to, int64_t step, const Weight<T>& w, int64_t column, int64_t width, int64_t begin,
                       int64_t end) {
  for (int64_t term = begin; term < end; term += kLanes)
    for (int64_t h = 0; h < width; h += kLanes) {
      Vec<float> taps[9][kLanes];
      load_taps(taps, w, column + h, term);
      float* out = to + (term - begin) * width + h;
      for (int i = 0; i < kLanes && term + i < end; ++i, out += width) {
        Vec<float> half[F::n][3], values[3], points[F::n];
        RAN_UNROLL for (int j = 0; j < 3; ++j) {
          RAN_UNROLL for (int k = 0; k < 3; ++k) values[k] = taps[k * 3 + j][i];
          F::weight(points, values);
          RAN_UNROLL for (int k = 0; k < F::n; ++k) half[k][j] = points[k];
        }
        RAN_UNROLL for (int k = 0; k < F::n; ++k) {
          F::weight(points, half[k]);
          RAN_UNROLL for (int j = 0; j < F::n; ++j) store(out + (k * F::n + j) * step, points[j]);
        }
      }
    }
}

// Where a packed weight's pieces lie.
struct Panels {
  int64_t columns, terms;  // rounded up
  template <typename T>
  explicit Panels(const Weight<T>& w) : columns(round_up(w.columns(), kLanes)), terms(round_up(w.terms(), kStep)) {}
  int64_t step() const { return apart(columns * terms); }  // from point to point
  int64_t at(int64_t column) const { return column * terms; }
};

template <class F, typename T>
void pack_weight(float* panels, const Weight<T>& w) {
  constexpr int64_t kChunk = 64;  // terms of a task
  const Panels layout(w);
  const int64_t chunks = (layout.terms + kChunk - 1) / kChunk, count = (layout.columns + kPanel - 1) / kPanel;
  parallel_for(0, count * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / chunks * kPanel, term = task % chunks * kChunk;
      const int64_t width = panel_width(column, layout.columns);
      pack_panel<F>(panels + layout.at(column) + term * width, layout.step(), w, column, width, term,
                    std::min(layout.terms, term + kChunk));
    }
  });
}

}  // namespace ran::cpu::RAN_ISA
