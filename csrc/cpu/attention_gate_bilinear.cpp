// The attention gate with bilinear up-sampling of the mask fused in.
//
// A low row, one of the mask, is stretched to the trunk's width once. The trunk's rows that lie between two low rows
// then mix the two in registers. Backward, they add the gradients of what they mixed up for either low row, at the
// trunk's width; where a low row's sum is whole it is folded to the mask's width. Nothing wider than four such rows
// is written beside the results. Each sum has one order, whichever thread takes it.
#include <algorithm>
#include <vector>

#include "../common/stencil.h"
#include "parallel.h"
#include "scratch.h"
#include "sigmoid.h"

namespace ran::cpu::RAN_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // values that are worth a thread

// Height or width in both resolutions.
template <typename A>
struct Axis {
  std::vector<Stencil<A, int64_t>> at;  // of each high coordinate
  std::vector<int64_t> start;           // of each low coordinate the first high one from which on it is low0; the end

  Axis(int64_t high, int64_t low) : at(size_t(high)), start(size_t(low + 1), high) {
    for (int64_t x = high - 1; x >= 0; --x) {
      at[x] = stencil(x, low, A(low) / A(high));
      start[at[x].low0] = x;
    }
  }
  int64_t low() const { return int64_t(start.size()) - 1; }

  // Calls body(high coordinate, weight) for all that have `low` in their stencil.
  template <typename Body>
  void for_taps(int64_t low, Body&& body) const {
    if (low > 0)
      for (int64_t x = start[low - 1]; x < start[low]; ++x) body(x, at[x].weight1);
    for (int64_t x = start[low]; x < start[low + 1]; ++x) {
      body(x, at[x].weight0);
      if (at[x].low1 == low) body(x, at[x].weight1);
    }
  }
};

// NCHW is n * c planes of one value a pixel, channels_last n planes of c values.
template <typename T, typename A = Acc<T>>
struct Planes {
  const GateShape g;
  const int64_t inner = g.channels_last ? g.c : 1, width = g.w * inner, low_width = g.mask_w() * inner;
  const Axis<A> y{g.h, g.mask_h()}, x{g.w, g.mask_w()};

  // A low row at the trunk's width. `line`: scratch of low_width.
  void stretch(A* wide, const T* low, A* line) const {
    if (inner == 1) {
      convert(line, low, low_width);
      for (int64_t i = 0; i < g.w; ++i)
        wide[i] = x.at[i].weight0 * line[x.at[i].low0] + x.at[i].weight1 * line[x.at[i].low1];
      return;
    }
    for (int64_t i = 0; i < g.w; ++i) {
      const auto& s = x.at[i];
      for_lanes<A>(inner, [&](int64_t c, int n) {
        const Vec<A> second = load(low + s.low1 * inner + c, n) * s.weight1;
        store(wide + i * inner + c, fma(splat(s.weight0), load(low + s.low0 * inner + c, n), second), n);
      });
    }
  }

  // Its transpose: of gradients at the trunk's width those of the low row.
  void fold(T* low, const A* wide, A* line) const {
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
    if (inner == 1) convert(low, line, low_width);
  }

  // Runs body(plane, first, end) for low rows of one plane that together are all.
  template <typename Body>
  void for_low_rows(Body&& body) const {
    const int64_t rows = y.low(), grain = std::max<int64_t>(1, kGrain * rows / (g.h * width));
    parallel_for(0, (g.channels_last ? g.n : g.n * g.c) * rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end;) {
        const int64_t plane = row / rows, first = row % rows, count = std::min(end - row, rows - first);
        body(plane, first, first + count);
        row += count;
      }
    });
  }
};

// The two stretched rows of the mask between which the trunk's rows lie.
template <typename T, typename A = Acc<T>>
class Pair {
 public:
  Pair(const Planes<T>& planes, const T* mask)
      : planes_(planes), mask_(mask), memory_(2 * planes.width + planes.low_width), first_(memory_.get()) {}

  // Before row i, and row i again where it is the last.
  void move_to(int64_t i) {
    if (i == next_) {
      std::swap(first_, second_);
    } else {
      planes_.stretch(first_, mask_ + i * planes_.low_width, line());
    }
    next_ = std::min(i + 1, planes_.y.low() - 1);
    planes_.stretch(second_, mask_ + next_ * planes_.low_width, line());
  }
  Vec<A> mixed(int64_t i, int n, const Stencil<A, int64_t>& s) const {
    return fma(splat(s.weight0), load(first_ + i, n), load(second_ + i, n) * s.weight1);
  }
  A* line() const { return memory_.get() + 2 * planes_.width; }

 private:
  const Planes<T>& planes_;
  const T* const mask_;
  const Scratch<A> memory_;
  A *first_, *second_ = first_ + planes_.width;
  int64_t next_ = -1;
};

template <typename T, typename A = Acc<T>>
void forward(T* out, const T* trunk, const T* mask, GateShape g) {
  const Planes<T> planes{g};
  planes.for_low_rows([&](int64_t plane, int64_t first, int64_t end) {
    Pair<T> pair(planes, mask + plane * planes.y.low() * planes.low_width);
    for (int64_t low = first; low < end; ++low) {
      pair.move_to(low);
      for_lanes<A>(planes.width, [&](int64_t i, int n) {
        for (int64_t y = planes.y.start[low]; y < planes.y.start[low + 1]; ++y) {
          const int64_t at = (plane * g.h + y) * planes.width + i;
          const Vec<A> t = load(trunk + at, n);
          store(out + at, fma(Sigmoid<T>(pair.mixed(i, n, planes.y.at[y])).s, t, t), n);
        }
      });
    }
  });
}

template <typename T, typename A = Acc<T>>
void backward(T* dtrunk, T* dmask, const T* dout, const T* trunk, const T* mask, GateShape g) {
  const Planes<T> planes{g};
  planes.for_low_rows([&](int64_t plane, int64_t first, int64_t end) {
    const int64_t low_plane = plane * planes.y.low() * planes.low_width;
    Pair<T> pair(planes, mask + low_plane);
    const Scratch<A> memory(2 * planes.width);
    A *const carried = memory.get(), *const whole = carried + planes.width;  // from the rows above; with those below
    std::fill_n(carried, planes.width, A(0));
    // The rows above the first low row belong to the part that has the low row before: there they are written.
    for (int64_t low = std::max<int64_t>(first - 1, 0); low < end; ++low) {
      pair.move_to(low);
      const bool own = low >= first, last = low + 1 == planes.y.low();
      for_lanes<A>(planes.width, [&](int64_t i, int n) {
        Vec<A> above{}, below{};  // gradients of the low row above the trunk's rows, and of the one below
        for (int64_t y = planes.y.start[low]; y < planes.y.start[low + 1]; ++y) {
          const int64_t at = (plane * g.h + y) * planes.width + i;
          const auto& s = planes.y.at[y];
          const Vec<A> d = load(dout + at, n), product = d * load(trunk + at, n), logits = pair.mixed(i, n, s);
          const Sigmoid<T> gate(logits);
          if (own) store(dtrunk + at, fma(gate.s, d, d), n);
          const Vec<A> gradient = gate.gradient(product, logits);
          above = fma(splat(s.weight0), gradient, above);
          below = fma(splat(s.weight1), gradient, below);
        }
        above += load(carried + i, n);
        store(whole + i, last ? above + below : above, n);
        store(carried + i, below, n);
      });
      if (own) planes.fold(dmask + low_plane + low * planes.low_width, whole, pair.line());
    }
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
