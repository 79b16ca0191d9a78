// The attention gate with bilinear up-sampling of the mask fused in.
//
// A low row, one of the mask, is stretched to the trunk's width once. The trunk's rows that lie between two low rows
// then mix the two in registers. Backward, they add the gradients of what they mixed up for either low row, at the
// trunk's width; where a low row's sum is whole it is folded to the mask's width. Nothing wider than four such rows
// is written beside the results. Each sum has one order, whichever thread takes it.
#include <algorithm>
#include <functional>
#include <vector>

#include "../common/stencil.h"
#include "parallel.h"
#include "scratch.h"
#include "sigmoid.h"

namespace ran::cpu::RAN_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // values that are worth a thread

// Where torch is compiled for instructions that multiply and add, the two are one rounding.
template <typename A>
A source(int64_t x, A ratio) {
#if defined(RAN_FMA)
  return std::fma(ratio, A(x) + A(0.5), A(-0.5));
#else
  return ratio * (A(x) + A(0.5)) - A(0.5);
#endif
}

// Height or width in both resolutions: the stencil of each high coordinate, in whole vectors of which the last lanes
// weigh nothing.
template <typename A>
struct Axis {
  std::vector<int64_t> low0, low1;
  std::vector<A> weight0, weight1;
  std::vector<int64_t> start;  // of each low coordinate the first high one from which on it is low0; the end

  Axis(int64_t high, int64_t low)
      : low0(size_t(round_up(high, VecOf<A>::lanes))),
        low1(low0),
        weight0(low0.size()),
        weight1(weight0),
        start(size_t(low + 1), high) {
    for (int64_t x = high - 1; x >= 0; --x) {
      const auto s = stencil(source(x, A(low) / A(high)), low);
      low0[x] = s.low0, low1[x] = s.low1, weight0[x] = s.weight0, weight1[x] = s.weight1;
      start[s.low0] = x;
    }
  }
  int64_t low() const { return int64_t(start.size()) - 1; }

  // Calls body(high coordinate, weight) for all that have `low` in their stencil.
  template <typename Body>
  void for_taps(int64_t low, Body&& body) const {
    if (low > 0)
      for (int64_t x = start[low - 1]; x < start[low]; ++x) body(x, weight1[x]);
    for (int64_t x = start[low]; x < start[low + 1]; ++x) {
      body(x, weight0[x]);
      if (low1[x] == low) body(x, weight1[x]);
    }
  }
};

// Whole vectors where there is `room` for them behind `to` and `from`, be it of what comes next: part of one takes a
// call of memcpy.
template <typename To, typename From>
void convert_row(To* to, const From* from, int64_t size, int64_t room) {
  constexpr int lanes = VecOf<Acc<To>>::lanes;
  for (int64_t i = 0; i < size; i += lanes)
    i + lanes <= room ? store(to + i, load(from + i)) : store(to + i, load(from + i, int(size - i)), int(size - i));
}

// NCHW is n * c planes of one value a pixel, channels_last n planes of c values.
template <typename T, typename A = Acc<T>>
struct Planes {
  static constexpr int64_t kBlock = 1024;  // values of a row, so that four stay in the first-level cache

  const GateShape g;
  const int64_t inner = g.channels_last ? g.c : 1, width = g.w * inner, low_width = g.mask_w() * inner;
  const int64_t low_size = (g.channels_last ? g.n : g.n * g.c) * g.mask_h() * low_width;
  const Axis<A> y{g.h, g.mask_h()}, x{g.w, g.mask_w()};

  // Of scratch for a row: whole vectors.
  int64_t padded(int64_t size) const { return round_up(size, VecOf<A>::lanes); }

  // Low row `row` of all at the trunk's width. `line`: scratch for a low row.
  void stretch(A* wide, const T* mask, int64_t row, A* line) const {
    const T* const low = mask + row * low_width;
    if (inner == 1) {
      constexpr int lanes = VecOf<A>::lanes;
      convert_row(line, low, low_width, low_size - row * low_width);
      // A vector at a time: one that is stored value by value cannot be read as a whole soon after.
      for (int64_t i = 0; i < g.w; i += lanes) {
        Vec<A> first, second;
        for (int k = 0; k < lanes; ++k) first[k] = line[x.low0[i + k]], second[k] = line[x.low1[i + k]];
        store(wide + i, fma(load(&x.weight0[i]), first, load(&x.weight1[i]) * second));
      }
      return;
    }
    for (int64_t i = 0; i < g.w; ++i)
      for_lanes<A>(inner, [&](int64_t c, int n) {
        const Vec<A> second = load(low + x.low1[i] * inner + c, n) * x.weight1[i];
        store(wide + i * inner + c, fma(splat(x.weight0[i]), load(low + x.low0[i] * inner + c, n), second), n);
      });
  }

  // Its transpose: of gradients at the trunk's width those of the low row. `room`: behind `low`, to be written later.
  void fold(T* low, const A* wide, A* line, int64_t room) const {
    for (int64_t j = 0; j < x.low(); ++j) {
      if (inner == 1) {
        A sum = 0;
        x.for_taps(j, [&](int64_t i, A weight) { sum += weight * wide[i]; });
        line[j] = sum;
        continue;
      }
      for_lanes<A>(inner, [&](int64_t c, int n) {
        Vec<A> sum{};
        x.for_taps(j, [&](int64_t i, A weight) { sum = fma(splat(weight), load(wide + i * inner + c, n), sum); });
        store(low + j * inner + c, sum, n);
      });
    }
    if (inner == 1) convert_row(low, line, low_width, room);
  }

  // Runs body(begin, end) for parts of the low rows, counted through all planes.
  void for_parts(const std::function<void(int64_t, int64_t)>& body) const {
    const int64_t grain = std::max<int64_t>(1, kGrain * y.low() / (g.h * width));
    parallel_for(0, low_size / low_width, grain, body);
  }

  // Runs body(plane, first, end) for those of each plane.
  template <typename Body>
  void for_planes(int64_t begin, int64_t end, Body&& body) const {
    for (int64_t row = begin; row < end;) {
      const int64_t plane = row / y.low(), first = row % y.low(), count = std::min(end - row, y.low() - first);
      body(plane, first, first + count);
      row += count;
    }
  }

  // Offset of the first trunk row that lies below low row `row`, counted through all planes, or below a later one.
  int64_t trunk_at(int64_t row) const { return (row / y.low() * g.h + y.start[row % y.low()]) * width; }

  // Runs body(y, offset, i, n) for the vectors of the trunk's rows y between `low` and the next low row, i being the
  // first value's place in its row. Those at a row's end may reach into the next row, which comes later, as long as it
  // lies before `limit`; the scratch is padded.
  template <typename Body>
  void for_vectors(int64_t plane, int64_t low, int64_t limit, Body&& body) const {
    constexpr int lanes = VecOf<A>::lanes;
    for (int64_t block = 0; block < width; block += kBlock)
      for (int64_t row = y.start[low]; row < y.start[low + 1]; ++row) {
        const int64_t at = (plane * g.h + row) * width, room = width <= kBlock ? limit - at : width;
        for (int64_t i = block; i < std::min(block + kBlock, width); i += lanes)
          i + lanes <= room ? body(row, at + i, i, lanes) : body(row, at + i, i, int(width - i));
      }
  }
};

// The two stretched rows of the mask between which the trunk's rows lie.
template <typename T, typename A = Acc<T>>
class Pair {
 public:
  Pair(const Planes<T>& planes, const T* mask)
      : planes_(planes),
        mask_(mask),
        memory_(2 * planes.padded(planes.width) + planes.padded(planes.low_width)),
        first_(memory_.get()),
        second_(first_ + planes.padded(planes.width)),
        line_(second_ + planes.padded(planes.width)) {
    std::fill(first_, line_, A(0));
  }

  // To a low row of a plane and the next; the last one has itself.
  void move_to(int64_t plane, int64_t low) {
    const int64_t row = plane * planes_.y.low() + low;
    if (row == next_) {
      std::swap(first_, second_);
    } else {
      planes_.stretch(first_, mask_, row, line_);
    }
    next_ = low + 1 == planes_.y.low() ? row : row + 1;
    planes_.stretch(second_, mask_, next_, line_);
  }
  // A vector of the mask in row y of the trunk, i values from the row's beginning.
  Vec<A> mixed(int64_t y, int64_t i) const {
    return fma(splat(planes_.y.weight0[y]), load(first_ + i), load(second_ + i) * planes_.y.weight1[y]);
  }
  A* line() const { return line_; }

 private:
  const Planes<T>& planes_;
  const T* const mask_;
  const Scratch<A> memory_;
  A *first_, *second_, *const line_;
  int64_t next_ = -1;
};

template <typename T, typename A = Acc<T>>
void forward(T* out, const T* trunk, const T* mask, GateShape g) {
  const Planes<T> planes{g};
  planes.for_parts([&](int64_t begin, int64_t stop) {
    Pair<T> pair(planes, mask);
    const int64_t limit = planes.trunk_at(stop);
    planes.for_planes(begin, stop, [&](int64_t plane, int64_t first, int64_t end) {
      for (int64_t low = first; low < end; ++low) {
        pair.move_to(plane, low);
        planes.for_vectors(plane, low, limit, [&](int64_t y, int64_t at, int64_t i, int n) {
          const Vec<A> t = load(trunk + at, n);
          store(out + at, fma(Sigmoid<T>(pair.mixed(y, i)).s, t, t), n);
        });
      }
    });
  });
}

template <typename T, typename A = Acc<T>>
void backward(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, GateShape g) {
  const Planes<T> planes{g};
  planes.for_parts([&](int64_t begin, int64_t stop) {
    Pair<T> pair(planes, mask);
    const int64_t limit = planes.trunk_at(stop), width = planes.padded(planes.width);
    const Scratch<A> memory(2 * width);
    A *above = memory.get(), *below = above + width;  // gradients of the low row above the trunk's rows, and below
    planes.for_planes(begin, stop, [&](int64_t plane, int64_t first, int64_t end) {
      std::fill_n(below, width, A(0));
      // The rows above the first low row belong to the part that has the low row before: there they are written.
      for (int64_t low = std::max<int64_t>(first - 1, 0); low < end; ++low) {
        pair.move_to(plane, low);
        std::swap(above, below);
        std::fill_n(below, width, A(0));
        const bool own = low >= first, last = low + 1 == planes.y.low();
        planes.for_vectors(plane, low, limit, [&](int64_t y, int64_t at, int64_t i, int n) {
          const Vec<A> d = load(dout + at, n), product = d * load(trunk + at, n), logits = pair.mixed(y, i);
          const Sigmoid<T> gate(logits);
          if (own) store(dtrunk + at, fma(gate.s, d, d), n);
          const Vec<A> gradient = gate.gradient(product, logits);
          store(above + i, fma(splat(planes.y.weight0[y]), gradient, load(above + i)));
          store(below + i, fma(splat(planes.y.weight1[y]), gradient, load(below + i)));
        });
        if (last)
          for (int64_t i = 0; i < width; ++i) above[i] += below[i];
        const int64_t row = plane * planes.y.low() + low;
        if (own) planes.fold(dmask + row * planes.low_width, above, pair.line(), (stop - row) * planes.low_width);
      }
    });
  });
}

}  // namespace

void attention_gate_bilinear_forward(void* out, const void* trunk, const void* mask, DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    forward(static_cast<T*>(out), static_cast<const T*>(trunk), static_cast<const T*>(mask), g);
  });
}

void attention_gate_bilinear_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask,
                                      DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    backward(static_cast<T*>(dtrunk), static_cast<T*>(dmask), static_cast<const T*>(dout), static_cast<const T*>(trunk),
             static_cast<const T*>(mask), g);
  });
}

}  // namespace ran::cpu::RAN_ISA
