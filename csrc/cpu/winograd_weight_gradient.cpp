// The weight gradient of 3x3 convolutions by Winograd's method: at every point the products of the gradient's and the
// input's transforms, summed over all tiles, then transformed to the nine taps. A NaN or infinity in a channel of x or
// dout may reach all nine taps of that channel, those as well that meet it at no pixel.
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "tables.h"
#include "weight_parts.h"
#include "wide_sum.h"
#include "winograd_tiles.h"

namespace ran::cpu::RAN_ISA {

#if defined(RAN_FMA)

namespace {

constexpr int64_t kTiles = 64;               // whose products are summed in float, a multiple of kRun
constexpr int64_t kChannels = 128;           // of a block of the weight, in and out: its sums stay near the core
constexpr int64_t kKept = int64_t{4} << 20;  // bytes of points that a thread keeps at a time

// A part of the work, which one thread does: channels [k, k + ks) x [c, c + cs) of the weight's gradient over tiles
// [first, last), the `share`th of the tiles.
struct Part {
  int64_t share, first, last, k, ks, c, cs;
};

// The weight in blocks of channels and the tiles in shares. Blocks get smaller where there are too few for the threads;
// no sum depends on them, and shares are a matter of the shape, so that the threads do not change the result. Parts
// have nothing in common but what they read: memory that another core has just written is slow to come.
struct Parts {
  int64_t tiles, shares, ks, cs, k_blocks, c_blocks;

  Parts(int64_t tiles, const ConvShape& s, int64_t threads) : tiles(tiles) {
    constexpr int64_t kShare = 1024, kEnough = 8;       // tiles of a share at least; parts that are enough
    constexpr int64_t kLeast = std::max(kRun, kPanel);  // channels of a block
    const auto set = [&](int64_t k, int64_t c) {
      ks = round_up(k, kRun), cs = round_up(c, kPanel);
      k_blocks = divide_up(s.co, ks), c_blocks = divide_up(s.ci, cs);
    };
    const auto even = [](int64_t count) { return divide_up(count, divide_up(count, kChannels)); };
    set(even(s.co), even(s.ci));
    for (shares = 1; 2 * count() <= kEnough && 2 * shares * kShare <= tiles;) shares *= 2;
    while (count() < threads && std::max(ks, cs) > kLeast) ks >= cs ? set(ks / 2, cs) : set(ks, cs / 2);
  }
  int64_t count() const { return k_blocks * c_blocks * shares; }
  Part at(int64_t index, const ConvShape& s) const {
    const int64_t share = index % shares, k = index / shares / c_blocks * ks, c = index / shares % c_blocks * cs;
    return {share, tiles * share / shares, tiles * (share + 1) / shares, k, std::min(ks, s.co - k),
            c,     std::min(cs, s.ci - c)};
  }
};

// to[i] = (fresh) or += from[i].
inline void add_wide(double* to, const float* from, int64_t count, bool fresh) {
  for (int64_t i = 0; i < count; i += VecOf<double>::lanes) {
    const Vec<double> wide = load_wide(from + i);
    store(to + i, fresh ? wide : load(to + i) + wide);
  }
}

template <class F, typename T, typename Activate>
class WeightGradient {
 public:
  WeightGradient(T* dweight, float* dbias, const T* dout, const T* x, const ConvShape& s, const Activate& activate)
      : dweight_(dweight),
        dbias_(dbias),
        dout_(dout),
        x_(x),
        s_(s),
        activate_(activate),
        grid_(s),
        parts_(grid_.count, s, max_threads()) {}

  // Each share's gradient, then their sum.
  void run() const {
    const bool alone = parts_.shares == 1;
    const WeightParts shares(alone ? 0 : parts_.shares, s_.co * 9 * s_.ci, s_.co);
    parallel_for(0, parts_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Part part = parts_.at(index, s_);
        alone ? run_part(dweight_, dbias_, part)
              : run_part(shares.dweight(part.share), dbias_ ? shares.dbias(part.share) : nullptr, part);
      }
    });
    if (!alone) shares.add_up(dweight_, dbias_);
  }

 private:
  static constexpr int kPoints = F::n * F::n;

  // The points of as many tiles as there is room for, and where they are: values [point][c / kPanel][tile][kPanel] and
  // gradient [point][tile][k].
  struct Points {
    float *values, *gradient;
    int64_t values_step, gradient_step, stride, columns, room;
  };

  template <typename W>
  void run_part(W* dweight, float* dbias, const Part& part) const {
    const int64_t columns = round_up(part.cs, kLanes), stride = round_up(part.ks, kLanes) + 16;
    const int64_t bytes = kPoints * int64_t(sizeof(float)) * (columns + stride), tiles = part.last - part.first;
    const int64_t room = std::min(round_up(tiles, kStep), std::max(kTiles, kKept / bytes / kTiles * kTiles));
    const int64_t values_step = apart(room * columns), gradient_step = apart(room * stride);
    const int64_t sums_step = apart(part.ks * columns);
    const Scratch<float> values(kPoints * values_step), gradient(kPoints * gradient_step);
    const Scratch<double> sums(kPoints * sums_step);
    const Points points{values.get(), gradient.get(), values_step, gradient_step, stride, columns, room};
    std::vector<float> bias(size_t(dbias && part.c == 0 ? part.ks : 0));
    for (int64_t first = part.first; first < part.last; first += room) {
      const int64_t last = std::min(first + room, part.last);
      transform(points, part, first, last - first, bias.empty() ? nullptr : bias.data());
      multiply(sums.get(), sums_step, points, part, last - first, first == part.first);
    }
    if (!bias.empty()) std::copy(bias.begin(), bias.end(), dbias + part.k);
    taps(dweight, sums.get(), sums_step, part);
  }

  void transform(const Points& to, const Part& part, int64_t first, int64_t tiles, float* bias) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t next = std::min(first + tile + 2, part.last);
      prefetch_tiles<false>(Touched<T>{x_ + part.c, s_.ci, part.cs, 1}, grid_, next, next + 1, 0, 1);
      prefetch_tiles<false>(Touched<T>{dout_ + part.k, s_.co, part.ks, 0}, grid_, next, next + 1, 0, 1);
      const Place place = grid_.at(first + tile);
      input_points<F>(x_, s_, s_.ci, place, part.c, part.cs, to.values_step, activate_, [&](int64_t c) {
        const int64_t panel = c / kPanel * kPanel;
        return to.values + panel * to.room + tile * panel_width(panel, to.columns) + c - panel;
      });
      gradient_points(to.gradient + tile * to.stride, to.gradient_step, place, part, bias);
    }
    for (int64_t tile = tiles; tile < round_up(tiles, kStep); ++tile)  // filled up with zeros
      for (int point = 0; point < kPoints; ++point) {
        std::fill_n(to.gradient + point * to.gradient_step + tile * to.stride, part.ks, 0.0f);
        for (int64_t c = 0; c < to.columns; c += kPanel) {
          const int64_t width = panel_width(c, to.columns);
          std::fill_n(to.values + point * to.values_step + c * to.room + tile * width, width, 0.0f);
        }
      }
  }

  // Into or on to sums [point][c / kPanel][k][kPanel]. Those of kTiles tiles are taken in float, then added up in
  // double: a long sum of floats would round more than the library's, which is shared among its threads.
  void multiply(double* sums, int64_t sums_step, const Points& from, const Part& part, int64_t tiles,
                bool fresh) const {
    const Scratch<float> products(part.ks * kPanel);
    const int64_t terms = round_up(tiles, kStep);
    for (int point = 0; point < kPoints; ++point)
      for (int64_t c = 0; c < from.columns; c += kPanel) {
        const int64_t width = panel_width(c, from.columns);
        for (int64_t done = 0; done < terms; done += kTiles) {
          multiply_panel<true>(products.get(), from.gradient + point * from.gradient_step + done * from.stride,
                               from.stride, from.values + point * from.values_step + c * from.room + done * width,
                               part.ks, width, std::min(kTiles, terms - done), false);
          add_wide(sums + point * sums_step + c * part.ks, products.get(), part.ks * width, fresh && done == 0);
        }
      }
  }

  // The points of a tile of dout, and its sums added to `bias`, or null.
  void gradient_points(float* to, int64_t step, const Place& place, const Part& part, float* bias) const {
    const Window<F::m, T> window(dout_ + place.image * s_.h * s_.w * s_.co, s_.h, s_.w, s_.co, place.y, place.x);
    const auto run = [&](auto whole) {
      for_lanes<float>(part.ks, [&](int64_t k, int lanes) {
        points_of<F::m, F::n, decltype(whole)::value>(
            to + k, step, window, part.k + k, lanes, [](auto* points, auto* values) { F::gradient(points, values); },
            [](Vec<float> v) { return v; });
        if (!bias) return;
        Vec<float> sum{};
        for (int i = 0; i < std::min(place.rows, F::m); ++i)
          for (int j = 0; j < std::min(place.columns, F::m); ++j) sum += load(window.at(i, j) + part.k + k, lanes);
        store(bias + k, load(bias + k, lanes) + sum, lanes);
      });
    };
    window.whole ? run(std::true_type()) : run(std::false_type());
  }

  // A part's gradient from its sums.
  template <typename W>
  void taps(W* dweight, const double* sums, int64_t sums_step, const Part& part) const {
    const int64_t columns = round_up(part.cs, kLanes);
    for (int64_t k = 0; k < part.ks; ++k)
      for_lanes<float>(part.cs, [&](int64_t c, int lanes) {
        const int64_t panel = c / kPanel * kPanel;
        const double* const at = sums + panel * part.ks + k * panel_width(panel, columns) + c - panel;
        Vec<float> half[3][F::n], points[F::n], out[3];
        RAN_UNROLL for (int j = 0; j < F::n; ++j) {
          RAN_UNROLL for (int i = 0; i < F::n; ++i) points[i] =
              WideSum<float>::at(at + (i * F::n + j) * sums_step).rounded();
          F::taps(out, points);
          RAN_UNROLL for (int i = 0; i < 3; ++i) half[i][j] = out[i];
        }
        W* const to = dweight + (part.k + k) * 9 * s_.ci + part.c + c;
        RAN_UNROLL for (int i = 0; i < 3; ++i) {
          F::taps(out, half[i]);
          RAN_UNROLL for (int j = 0; j < 3; ++j) store(to + (i * 3 + j) * s_.ci, out[j], lanes);
        }
      });
  }

  T* const dweight_;
  float* const dbias_;
  const T *const dout_, *const x_;
  const ConvShape s_;
  const Activate activate_;
  const TileGrid<F::m> grid_;
  const Parts parts_;
};

}  // namespace

void conv3x3_weight_gradient(Conv3x3 tile, void* dweight, float* dbias, const void* dout, const void* x, DType dtype,
                             ConvShape s, const BatchNorm<void>* bn) {
  const auto run = [&](const auto& activate) {
    with_float_acc(dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      using Activate = std::decay_t<decltype(activate)>;
      T* const to = static_cast<T*>(dweight);
      const T *const dy = static_cast<const T*>(dout), *const from = static_cast<const T*>(x);
      if (tile == Conv3x3::f4x4)
        WeightGradient<Winograd<4>, T, Activate>(to, dbias, dy, from, s, activate).run();
      else
        WeightGradient<Winograd<2>, T, Activate>(to, dbias, dy, from, s, activate).run();
    });
  };
  if (!bn) return run(AsItIs());
  const ScaleShiftTable<float> table(typed<float>(*bn), s.ci);
  run(ScaleShiftRelu{table.scale, table.shift});
}

#else

void conv3x3_weight_gradient(Conv3x3, void*, float*, const void*, const void*, DType, ConvShape,
                             const BatchNorm<void>*) {}

#endif

}  // namespace ran::cpu::RAN_ISA
