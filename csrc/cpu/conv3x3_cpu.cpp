// 3x3 convolutions of channels_last float tensors, stride 1 and padding 1, by the minimal filtering algorithm F(2x2,
// 3x3) (Winograd 1980; Lavin and Gray 2016): 16 multiplications where the definition has 36. Batch normalisation and
// ReLU are applied while the input is transformed, and bias, residual, the ReLU's mask and the two sums of batch
// normalisation's backward ride in the output's transform. For AVX-512. Measured against double, results and data
// gradients are off by 0.5 to 0.8 times what the direct sum is, whose runs of additions are longer.
#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "kernels_isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tables.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {

#if defined(__AVX512F__)

namespace {

using V = Vec<float>;

constexpr int kPoints = 16;  // of a 4x4 input tile, transformed
constexpr int kLanes = 16;

using Floats = Scratch<float>;

// From one point's `count` values to the next one's: points a power of two apart would meet in one set of the cache.
constexpr int64_t apart(int64_t count) { return count + kLanes; }

// The 2x2 tiles of the output, in blocks that are a task each.
struct Tiles {
  int64_t high, wide, count, block;

  // A block's transformed input takes half of a core's second-level cache; small tensors make eight blocks at least.
  Tiles(const ConvShape& s, int64_t channels)
      : high((s.h + 1) / 2), wide((s.w + 1) / 2), count(s.n * high * wide), block(0) {
    const int64_t fits = std::max<int64_t>(kRows, 8192 / channels), few = (count / 8 + kRows - 1) / kRows * kRows;
    block = std::clamp<int64_t>(std::min(fits, few) / kRows * kRows, kRows, 64);
  }
  int64_t blocks() const { return (count + block - 1) / block; }
};

struct Place {
  int64_t image, y, x;  // of the first of a tile's 2x2 output pixels
};

Place place_of(const Tiles& tiles, int64_t tile) {
  const int64_t row = tile / tiles.wide;
  return {row / tiles.high, row % tiles.high * 2, (tile - row * tiles.wide) * 2};
}

// B^T d B of 4x4 values, in place.
inline void transform_input(V (&d)[4][4]) {
  for (int j = 0; j < 4; ++j) {
    const V a = d[0][j] - d[2][j], b = d[1][j] + d[2][j], c = d[2][j] - d[1][j], e = d[1][j] - d[3][j];
    d[0][j] = a, d[1][j] = b, d[2][j] = c, d[3][j] = e;
  }
  for (int i = 0; i < 4; ++i) {
    const V a = d[i][0] - d[i][2], b = d[i][1] + d[i][2], c = d[i][2] - d[i][1], e = d[i][1] - d[i][3];
    d[i][0] = a, d[i][1] = b, d[i][2] = c, d[i][3] = e;
  }
}

// G g G^T: three taps become four points along each axis.
inline void transform_weight(V (&u)[4][4], const V (&g)[3][3]) {
  V half[4][3];
  for (int j = 0; j < 3; ++j) {
    const V ends = g[0][j] + g[2][j];
    half[0][j] = g[0][j], half[1][j] = 0.5f * (ends + g[1][j]), half[2][j] = 0.5f * (ends - g[1][j]);
    half[3][j] = g[2][j];
  }
  for (int i = 0; i < 4; ++i) {
    const V ends = half[i][0] + half[i][2];
    u[i][0] = half[i][0], u[i][1] = 0.5f * (ends + half[i][1]), u[i][2] = 0.5f * (ends - half[i][1]);
    u[i][3] = half[i][2];
  }
}

// A^T m A: 4x4 products become 2x2 outputs.
inline void transform_output(V (&y)[2][2], const V (&m)[4][4]) {
  V half[2][4];
  for (int j = 0; j < 4; ++j) {
    half[0][j] = m[0][j] + m[1][j] + m[2][j];
    half[1][j] = m[1][j] - m[2][j] - m[3][j];
  }
  for (int i = 0; i < 2; ++i) {
    y[i][0] = half[i][0] + half[i][1] + half[i][2];
    y[i][1] = half[i][1] - half[i][2] - half[i][3];
  }
}

// A tile's 4x4 pixels of `channels` values each, activated and transformed; put(point, channel, vector) takes them.
template <typename Activate, typename Put>
inline void transform_tile(const float* x, const ConvShape& s, int64_t channels, const Place& at, Activate&& activate,
                           Put&& put) {
  const float* pixel[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t y = at.y + i - 1, column = at.x + j - 1;
      const bool inside = y >= 0 && y < s.h && column >= 0 && column < s.w;
      pixel[i][j] = inside ? x + ((at.image * s.h + y) * s.w + column) * channels : nullptr;
    }
  for (int64_t c = 0; c < channels; c += kLanes) {
    V d[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) d[i][j] = pixel[i][j] ? activate(load(pixel[i][j] + c), c) : V{};  // padding
    transform_input(d);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) put(4 * i + j, c, d[i][j]);
  }
}

// Every block of tiles: transform the input, multiply point by point, 32 columns at a time; finish(place, outputs,
// first column, block) takes two vectors of 2x2 outputs. panels: [point][columns / 32][channels][32].
template <typename Activate, typename Finish>
void convolve(const float* x, const float* panels, const ConvShape& s, int64_t channels, int64_t columns,
              Activate&& activate, Finish&& finish) {
  const Tiles tiles(s, channels);
  parallel_for(0, tiles.blocks(), 1, [&](int64_t begin, int64_t end) {
    const int64_t strips_size = apart(tiles.block * channels), products_size = apart(tiles.block * kColumns);
    const Floats strips(kPoints * strips_size), products(kPoints * products_size);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * tiles.block, rows = std::min(tiles.block, tiles.count - first);
      for (int64_t row = 0; row < rows; ++row) {
        float* const strip = strips.get() + row / kRows * kRows * channels + row % kRows * kChunk;
        transform_tile(x, s, channels, place_of(tiles, first + row), activate,
                       [&](int point, int64_t c, V v) { store(strip + point * strips_size + c * kRows, v); });
      }
      for (int64_t column = 0; column < columns; column += kColumns) {
        for (int point = 0; point < kPoints; ++point) {
          const float* const panel = panels + point * apart(columns * channels) + column * channels;
          for (int64_t row = 0; row < rows; row += kRows) {  // rows past the last are multiplied, and not read
            Tile<float> tile{};
            multiply_strip(tile, reinterpret_cast<const uint32_t*>(strips.get() + point * strips_size + row * channels),
                           reinterpret_cast<const uint32_t*>(panel), channels);
            float* const out = products.get() + point * products_size + row * kColumns;
            for (int r = 0; r < kRows; ++r)
              for (int h = 0; h < 2; ++h) store(out + r * kColumns + h * kLanes, tile.at[r][h]);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          const Place at = place_of(tiles, first + row);
          for (int h = 0; h < 2; ++h) {
            V m[4][4], y[2][2];
            for (int point = 0; point < kPoints; ++point)
              m[point / 4][point % 4] = load(products.get() + point * products_size + row * kColumns + h * kLanes);
            transform_output(y, m);
            finish(at, y, column + h * kLanes, block);
          }
        }
      }
    }
  });
}

// Lanes of two rows a and b: `low`, a's without `step`, then b's; `high`, those with it.
struct Exchange {
  int32_t low[kLanes], high[kLanes];
};
constexpr Exchange exchange(int step) {
  Exchange e{};
  for (int i = 0; i < kLanes; ++i) {
    e.low[i] = i & step ? kLanes + i - step : i;
    e.high[i] = i & step ? kLanes + i : i + step;
  }
  return e;
}

template <int kStep>
inline void transpose_step(V (&rows)[kLanes]) {
  static constexpr Exchange kExchange = exchange(kStep);
  Int32 low, high;
  std::memcpy(&low, kExchange.low, sizeof low);
  std::memcpy(&high, kExchange.high, sizeof high);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const V a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// 16x16 values, transposed.
inline void transpose(V (&rows)[kLanes]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  transpose_step<4>(rows);
  transpose_step<8>(rows);
}

// A dY A^T of a tile's 2x2 gradients; put(point, channel, vector) takes them.
template <typename Put>
inline void transform_gradient(const float* dout, const ConvShape& s, const Place& at, Put&& put) {
  const float* pixel[2][2];
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const bool inside = at.y + i < s.h && at.x + j < s.w;
      pixel[i][j] = inside ? dout + ((at.image * s.h + at.y + i) * s.w + at.x + j) * s.co : nullptr;
    }
  for (int64_t c = 0; c < s.co; c += kLanes) {
    V y[2][2];
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) y[i][j] = pixel[i][j] ? load(pixel[i][j] + c) : V{};
    const V half[4][2] = {{y[0][0], y[0][1]},
                          {y[0][0] + y[1][0], y[0][1] + y[1][1]},
                          {y[0][0] - y[1][0], y[0][1] - y[1][1]},
                          {-y[1][0], -y[1][1]}};
    for (int i = 0; i < 4; ++i) {
      put(4 * i, c, half[i][0]);
      put(4 * i + 1, c, half[i][0] + half[i][1]);
      put(4 * i + 2, c, half[i][0] - half[i][1]);
      put(4 * i + 3, c, -half[i][1]);
    }
  }
}

// G^T u G: the points' gradients become the nine taps'.
inline void transform_points(V (&g)[3][3], const V (&u)[4][4]) {
  V half[3][4];
  for (int j = 0; j < 4; ++j) {
    const V middle = 0.5f * (u[1][j] + u[2][j]);
    half[0][j] = u[0][j] + middle, half[1][j] = 0.5f * (u[1][j] - u[2][j]), half[2][j] = middle + u[3][j];
  }
  for (int i = 0; i < 3; ++i) {
    const V middle = 0.5f * (half[i][1] + half[i][2]);
    g[i][0] = half[i][0] + middle, g[i][1] = 0.5f * (half[i][1] - half[i][2]), g[i][2] = middle + half[i][3];
  }
}

// A weight (co, 3, 3, ci) as panels of its points, summed over ci.
void pack_forward(float* panels, const float* weight, const ConvShape& s) {
  parallel_for(0, s.co / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * kLanes; k < end * kLanes; k += kLanes)
      for (int64_t c = 0; c < s.ci; c += kLanes) {
        V points[kPoints][kLanes];
        for (int row = 0; row < kLanes; ++row) {
          V g[3][3], u[4][4];
          for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = load(weight + ((k + row) * 9 + tap) * s.ci + c);
          transform_weight(u, g);
          for (int point = 0; point < kPoints; ++point) points[point][row] = u[point / 4][point % 4];
        }
        for (int point = 0; point < kPoints; ++point) {
          transpose(points[point]);
          float* const out =
              panels + point * apart(s.co * s.ci) + k / kColumns * kColumns * s.ci + c * kColumns + k % kColumns;
          for (int i = 0; i < kLanes; ++i) store(out + i * kColumns, points[point][i]);
        }
      }
  });
}

// The same of the weight turned by half a turn, summed over co: what the input's gradient is convolved with.
void pack_backward(float* panels, const float* weight, const ConvShape& s) {
  parallel_for(0, s.co, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; c < s.ci; c += kLanes) {
        V g[3][3], u[4][4];
        for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = load(weight + (k * 9 + 8 - tap) * s.ci + c);
        transform_weight(u, g);
        for (int point = 0; point < kPoints; ++point)
          store(panels + point * apart(s.ci * s.co) + c / kColumns * kColumns * s.co + k * kColumns + c % kColumns,
                u[point / 4][point % 4]);
      }
  });
}

}  // namespace

bool conv3x3_supported(DType dtype, ConvShape s) {
  // Fewer tiles than a register tile has rows leave it idle in part: with many channels the library is faster then.
  if (Tiles(s, kColumns).count < kRows && s.ci * s.co > 256 * 256) return false;
  return dtype == DType::f32 && s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 1 &&
         s.pad_w == 1 && s.ci % kColumns == 0 && s.co % kColumns == 0 && s.pixels() > 0;
}

int64_t conv3x3_panels_size(ConvShape s) { return kPoints * apart(s.ci * s.co); }

void conv3x3_pack(float* panels, const float* weight, ConvShape s) { pack_forward(panels, weight, s); }

void conv3x3_forward(float* out, const float* x, const float* weight, const float* panels, const float* bias,
                     const float* residual, bool with_relu, ConvShape s, const BatchNorm<void>* bn) {
  if (!panels) {
    const Floats packed(conv3x3_panels_size(s));
    pack_forward(packed.get(), weight, s);
    return conv3x3_forward(out, x, weight, packed.get(), bias, residual, with_relu, s, bn);
  }
  const auto finish = [&](const Place& at, V(&y)[2][2], int64_t column, int64_t) {
    const V added = bias ? load(bias + column) : V{};
    for (int i = 0; i < 2 && at.y + i < s.h; ++i)
      for (int j = 0; j < 2 && at.x + j < s.w; ++j) {
        const int64_t to = ((at.image * s.h + at.y + i) * s.w + at.x + j) * s.co + column;
        V value = y[i][j] + added;
        if (residual) value += load(residual + to);
        store(out + to, with_relu ? relu(value) : value);
      }
  };
  if (!bn) return convolve(x, panels, s, s.ci, s.co, [](V v, int64_t) { return v; }, finish);
  const ScaleShiftTable<float> table(typed<float>(*bn), s.ci);
  const auto activate = [&](V v, int64_t c) { return relu(fma(v, load(table.scale + c), load(table.shift + c))); };
  convolve(x, panels, s, s.ci, s.co, activate, finish);
}

void conv3x3_data_gradient(float* dz, float* sum_dz, float* sum_dz_xhat, const float* dout, const float* x,
                           const float* weight, ConvShape s, BatchNorm<void> bn_) {
  const BatchNorm<float> bn = typed<float>(bn_);
  const ScaleShiftTable<float> table(bn, s.ci);
  const Floats panels(kPoints * apart(s.ci * s.co));
  pack_backward(panels.get(), weight, s);
  const int64_t blocks = Tiles(s, s.co).blocks();
  std::vector<float> partial(size_t(blocks * 2 * s.ci), 0.0f);
  const auto as_it_is = [](V v, int64_t) { return v; };
  convolve(dout, panels.get(), s, s.co, s.ci, as_it_is, [&](const Place& at, V(&y)[2][2], int64_t c, int64_t block) {
    float* const sums = partial.data() + block * 2 * s.ci + c;
    const V scale = load(table.scale + c), shift = load(table.shift + c), mean = load(bn.mean + c);
    V s0 = load(sums), s1 = load(sums + s.ci);
    for (int i = 0; i < 2 && at.y + i < s.h; ++i)
      for (int j = 0; j < 2 && at.x + j < s.w; ++j) {
        const int64_t to = ((at.image * s.h + at.y + i) * s.w + at.x + j) * s.ci + c;
        const V value = load(x + to), masked = fma(value, scale, shift) <= V{} ? V{} : y[i][j];
        store(dz + to, masked);
        s0 += masked;
        s1 = fma(masked, value - mean, s1);
      }
    store(sums, s0);
    store(sums + s.ci, s1);
  });
  finish_sums(sum_dz, sum_dz_xhat, partial.data(), blocks, s.ci, bn);
}

void conv3x3_weight_gradient(float* dweight, float* dbias, const float* dout, const float* x, ConvShape s,
                             BatchNorm<void> bn) {
  constexpr int64_t kStep = 256, kRun = 128;  // tiles transformed in one go; tiles in a sum: short ones round less
  const ScaleShiftTable<float> table(typed<float>(bn), s.ci);
  const auto activate = [&](V v, int64_t c) { return relu(fma(v, load(table.scale + c), load(table.shift + c))); };
  const Tiles tiles(s, s.ci);
  // [point][co / 16][tile][16], [point][ci / 32][tile][32] and [point][co][ci].
  const int64_t group_size = apart(kStep * kLanes), gradient_size = apart(s.co / kLanes * group_size),
                panel_size = apart(kStep * kColumns), activation_size = apart(s.ci / kColumns * panel_size),
                points_size = apart(s.co * s.ci);
  const Floats gradient(kPoints * gradient_size), activation(kPoints * activation_size), points(kPoints * points_size);
  if (dbias) std::fill_n(dbias, s.co, 0.0f);
  for (int64_t first = 0; first < tiles.count; first += kStep) {
    const int64_t rows = std::min(kStep, tiles.count - first);
    parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Place at = place_of(tiles, first + row);
        transform_gradient(dout, s, at, [&](int point, int64_t c, V v) {
          store(gradient.get() + point * gradient_size + c / kLanes * group_size + row * kLanes, v);
        });
        transform_tile(x, s, s.ci, at, activate, [&](int point, int64_t c, V v) {
          store(activation.get() + point * activation_size + c / kColumns * panel_size + row * kColumns + c % kColumns,
                v);
        });
      }
    });
    const int64_t strips = s.co / kRows;
    parallel_for(0, kPoints * strips, 4, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t point = strip / strips, row = strip % strips * kRows;
        const float* const a = gradient.get() + point * gradient_size + row / kLanes * group_size + row % kLanes;
        for (int64_t column = 0; column < s.ci; column += kColumns) {
          const float* const b = activation.get() + point * activation_size + column / kColumns * panel_size;
          float* const sum = points.get() + point * points_size + row * s.ci + column;
          for (int64_t from = 0; from < rows; from += kRun) {
            Tile<float> tile{};
            multiply_columns(tile, reinterpret_cast<const uint32_t*>(a + from * kLanes),
                             reinterpret_cast<const uint32_t*>(b + from * kColumns), std::min(kRun, rows - from));
            for (int r = 0; r < kRows; ++r)
              for (int h = 0; h < 2; ++h) {
                float* const to = sum + r * s.ci + h * kLanes;
                store(to, first + from ? load(to) + tile.at[r][h] : tile.at[r][h]);
              }
          }
        }
      }
    });
    if (dbias)  // the sixth point is the sum of a tile's gradients
      for (int64_t c = 0; c < s.co; c += kLanes) {
        V sum{};
        const float* const sums = gradient.get() + 5 * gradient_size + c / kLanes * group_size;
        for (int64_t row = 0; row < rows; ++row) sum += load(sums + row * kLanes);
        store(dbias + c, load(dbias + c) + sum);
      }
  }
  parallel_for(0, s.co, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; c < s.ci; c += kLanes) {
        V u[4][4], g[3][3];
        for (int point = 0; point < kPoints; ++point)
          u[point / 4][point % 4] = load(points.get() + point * points_size + k * s.ci + c);
        transform_points(g, u);
        for (int tap = 0; tap < 9; ++tap) store(dweight + (k * 9 + tap) * s.ci + c, g[tap / 3][tap % 3]);
      }
  });
}

#else  // no AVX-512: the convolution goes to ATen

bool conv3x3_supported(DType, ConvShape) { return false; }
int64_t conv3x3_panels_size(ConvShape) { return 0; }
void conv3x3_pack(float*, const float*, ConvShape) {}
void conv3x3_forward(float*, const float*, const float*, const float*, const float*, const float*, bool, ConvShape,
                     const BatchNorm<void>*) {}
void conv3x3_data_gradient(float*, float*, float*, const float*, const float*, const float*, ConvShape,
                           BatchNorm<void>) {}
void conv3x3_weight_gradient(float*, float*, const float*, const float*, ConvShape, BatchNorm<void>) {}

#endif

}  // namespace ran::cpu::RAN_ISA
