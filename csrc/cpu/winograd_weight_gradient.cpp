// The weight gradient of 3x3 convolutions by Winograd's method: at every point the products of the gradient's and the
// input's transforms, summed over all tiles, then transformed to the nine taps. A NaN or infinity in a channel of x or
// dout may reach all nine taps of that channel, those as well that meet it at no pixel.
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "tables.h"
#include "wide_sum.h"
#include "winograd_tiles.h"

namespace ran::cpu::RAN_ISA {

#if defined(RAN_FMA)

namespace {

constexpr int64_t kTiles = 64;      // transformed in one go, a multiple of kRun
constexpr int64_t kChannels = 128;  // of a block of the weight, in and out: its sums stay near the core

// A part of the work: for `rows` rows of the points, the sums of channels [k, k + ks) x [c, c + cs) over all tiles.
struct Part {
  int64_t block, k, ks, c, cs;
  int row, rows;
};

// The weight in blocks of channels, each in parts of whole rows of points, so that all threads have something to do.
// Every sum is taken in one part, in the order of the tiles: the parts do not change it.
struct Parts {
  int64_t ks, cs, k_blocks, c_blocks;
  int splits;  // of the rows of points

  Parts(int n, const ConvShape& s, int64_t threads) {
    k_blocks = (s.co + kChannels - 1) / kChannels, c_blocks = (s.ci + kChannels - 1) / kChannels;
    splits = 1;
    for (int more = 2; more <= n && k_blocks * c_blocks * splits < threads; ++more)
      if (n % more == 0) splits = more;
    while (k_blocks * c_blocks * splits < threads && k_blocks * kRun < s.co) k_blocks *= 2;
    ks = round_up((s.co + k_blocks - 1) / k_blocks, kRun), cs = round_up((s.ci + c_blocks - 1) / c_blocks, kPanel);
    k_blocks = (s.co + ks - 1) / ks, c_blocks = (s.ci + cs - 1) / cs;
  }
  int64_t blocks() const { return k_blocks * c_blocks; }
  int64_t count() const { return blocks() * splits; }
  Part at(int64_t index, int n, const ConvShape& s) const {
    const int64_t block = index / splits, k = block / c_blocks * ks, c = block % c_blocks * cs;
    const int rows = n / splits;
    return {block, k, std::min(ks, s.co - k), c, std::min(cs, s.ci - c), int(index % splits) * rows, rows};
  }
};

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
        parts_(F::n, s, max_threads()),
        sums_step_(apart(parts_.ks * round_up(parts_.cs, kLanes))) {}

  void run() const {
    // All parts of a block add to one set of sums; where there is but one part, a thread needs only its own.
    const bool alone = parts_.splits == 1;
    const int64_t size = F::n * F::n * sums_step_;
    const Scratch<double> shared(alone ? 0 : parts_.blocks() * size);
    parallel_for(0, parts_.count(), 1, [&](int64_t begin, int64_t end) {
      const Scratch<double> own(alone ? size : 0);
      for (int64_t index = begin; index < end; ++index) {
        const Part part = parts_.at(index, F::n, s_);
        double* const sums = alone ? own.get() : shared.get() + part.block * size;
        add_up(sums, part);
        if (alone) taps(sums, part, part.k, part.k + part.ks);
      }
    });
    if (alone) return;
    parallel_for(0, s_.co, 8, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < parts_.blocks(); ++block) {
        const Part part = parts_.at(block * parts_.splits, F::n, s_);
        taps(shared.get() + block * size, part, std::max(begin, part.k), std::min(end, part.k + part.ks));
      }
    });
  }

 private:
  // sums [point][c / kPanel][k][kPanel], of a part's points. Those of kTiles tiles are taken in float, then added up in
  // double: a long sum of floats would round more than the library's, which is shared among its threads.
  void add_up(double* sums, const Part& part) const {
    const int points = part.rows * F::n, first_point = part.row * F::n;
    const int64_t columns = round_up(part.cs, kLanes), stride = part.ks + 16;
    const int64_t values_step = apart(kTiles * columns), gradient_step = apart(kTiles * stride);
    const Scratch<float> values(points * values_step), gradient(points * gradient_step), products(part.ks * kPanel);
    std::vector<float> bias(size_t(dbias_ && part.row == 0 && part.c == 0 ? part.ks : 0));
    for (int64_t first = 0; first < grid_.count; first += kTiles) {
      const int64_t tiles = std::min(kTiles, grid_.count - first), terms = round_up(tiles, kStep);
      for (int64_t tile = 0; tile < tiles; ++tile)
        input_points<F>(x_, s_, s_.ci, grid_.at(first + tile), part.c, part.cs, part.row, part.rows, values_step,
                        activate_, [&](int64_t c) {
                          const int64_t panel = c / kPanel * kPanel;
                          return values.get() + panel * kTiles + tile * panel_width(panel, columns) + c - panel;
                        });
      for (int64_t tile = 0; tile < tiles; ++tile)
        gradient_points(gradient.get() + tile * stride, gradient_step, grid_.at(first + tile), part,
                        bias.empty() ? nullptr : bias.data());
      for (int64_t tile = tiles; tile < terms; ++tile)  // filled up with zeros
        for (int point = 0; point < points; ++point) {
          std::fill_n(gradient.get() + point * gradient_step + tile * stride, part.ks, 0.0f);
          for (int64_t c = 0; c < columns; c += kPanel) {
            const int64_t width = panel_width(c, columns);
            std::fill_n(values.get() + point * values_step + c * kTiles + tile * width, width, 0.0f);
          }
        }
      for (int point = 0; point < points; ++point) {
        if (part.cs + part.ks <= kChannels) {  // what wider parts multiply would push it out of the cache again
          const int64_t next = first + kTiles;
          prefetch_tiles<false>(Touched<T>{x_ + part.c, s_.ci, part.cs, 1}, grid_, next, next + kTiles, point, points);
          prefetch_tiles<false>(Touched<T>{dout_ + part.k, s_.co, part.ks, 0}, grid_, next, next + kTiles, point,
                                points);
        }
        for (int64_t c = 0; c < columns; c += kPanel) {
          const int64_t width = panel_width(c, columns);
          multiply_panel<true>(products.get(), gradient.get() + point * gradient_step, stride,
                               values.get() + point * values_step + c * kTiles, part.ks, width, terms, false);
          double* const to = sums + (first_point + point) * sums_step_ + c * parts_.ks;
          for (int64_t i = 0; i < part.ks * width; i += kLanes) {
            WideSum<float> sum = first ? WideSum<float>::at(to + i) : WideSum<float>();
            sum += load(products.get() + i);
            sum.store_to(to + i, kLanes);
          }
        }
      }
    }
    if (!bias.empty()) std::copy(bias.begin(), bias.end(), dbias_ + part.k);
  }

  // The points of a tile of dout, and its sums added to `bias`, or null.
  void gradient_points(float* to, int64_t step, const Place& place, const Part& part, float* bias) const {
    const Window<F::m, T> window(dout_ + place.image * s_.h * s_.w * s_.co, s_.h, s_.w, s_.co, place.y, place.x);
    const auto run = [&](auto whole) {
      for_lanes<float>(part.ks, [&](int64_t k, int lanes) {
        points_of<F::m, F::n, decltype(whole)::value>(to + k, step, window, part.k + k, lanes, part.row, part.rows,
                                                      F::gradient, [](Vec<float> v) { return v; });
        if (!bias) return;
        Vec<float> sum{};
        for (int i = 0; i < std::min(place.rows, F::m); ++i)
          for (int j = 0; j < std::min(place.columns, F::m); ++j) sum += load(window.at[i][j] + part.k + k, lanes);
        store(bias + k, load(bias + k, lanes) + sum, lanes);
      });
    };
    window.whole ? run(std::true_type()) : run(std::false_type());
  }

  // dweight of rows [begin, end) from a part's block of sums.
  void taps(const double* sums, const Part& part, int64_t begin, int64_t end) const {
    const int64_t columns = round_up(part.cs, kLanes);
    for (int64_t k = begin; k < end; ++k)
      for_lanes<float>(part.cs, [&](int64_t c, int lanes) {
        const int64_t panel = c / kPanel * kPanel;
        const double* const at = sums + panel * parts_.ks + (k - part.k) * panel_width(panel, columns) + c - panel;
        Vec<float> half[3][F::n], points[F::n], out[3];
        RAN_UNROLL for (int j = 0; j < F::n; ++j) {
          RAN_UNROLL for (int i = 0; i < F::n; ++i) points[i] =
              WideSum<float>::at(at + (i * F::n + j) * sums_step_).rounded();
          F::taps(out, points);
          RAN_UNROLL for (int i = 0; i < 3; ++i) half[i][j] = out[i];
        }
        T* const to = dweight_ + k * 9 * s_.ci + part.c + c;
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
  const int64_t sums_step_;
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
