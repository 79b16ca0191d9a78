// Convolutions of channels_last tensors as matrix products, for AVX2 and up. For 1x1 ones batch normalisation and ReLU
// are applied while the operand is packed, and bias, residual, the ReLU's mask and the two sums of batch
// normalisation's backward ride in the epilogue, so that the activation is never written out. The weight gradient takes
// any kernel size, one tap at a time.
#include <algorithm>
#include <vector>

#include "caches.h"
#include "gemm.h"
#include "kernels.h"
#include "moments.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "tables.h"
#include "vec.h"
#include "weight_parts.h"

namespace ran::cpu::RAN_ISA {

#if defined(RAN_FMA)

namespace {

// Pixels of one task: its packed operand stays in a core's second-level cache.
constexpr int64_t kBlockRows = (64 + kRows - 1) / kRows * kRows;
constexpr int64_t kGradientWords = 128;  // words along the pixels in one step of the weight gradient
// From one of its panels to the next: by a power of two all would share few lines of the first-level cache.
constexpr int64_t kPanelWords = kGradientWords + 4;

using Words = Scratch<uint32_t>;

// `rows` x `channels` values as A strips; value(row, channel, lanes) gives a vector of floats, those past `lanes` 0.
// Rows past the end are 0.
template <typename T, typename Value>
inline void pack_strips(uint32_t* strips, int64_t rows, int64_t channels, Value&& value) {
  constexpr int values = WordOf<T>::values;
  using Packed = std::conditional_t<WordOf<T>::is_pair, T, float>;
  const int64_t count = WordOf<T>::words(channels);
  for (int64_t row = 0; row < round_up(rows, kRows); ++row) {
    uint32_t* const strip = strips + row / kRows * kRows * count + row % kRows * kChunk;
    const auto write = [&](int64_t c, Vec<float> v) {
      const int64_t word = c / values;
      store(reinterpret_cast<Packed*>(strip + word / kChunk * kRows * kChunk) + c % (kChunk * values), v);
    };
    for_lanes<float>(channels,
                     [&](int64_t c, int lanes) { write(c, row < rows ? value(row, c, lanes) : Vec<float>{}); });
    for (int64_t c = round_up(channels, kLanes); c < count * values; c += kLanes) write(c, Vec<float>{});
  }
}

// Pixels [begin, end) in blocks of kBlockRows, shared among the threads; body(first row, rows, scratch of `size`
// words).
template <typename Body>
void for_blocks(int64_t m, int64_t size, Body&& body) {
  parallel_for(0, divide_up(m, kBlockRows), 1, [&](int64_t begin, int64_t end) {
    const Words scratch(size);
    for (int64_t block = begin; block < end; ++block)
      body(block * kBlockRows, std::min(kBlockRows, m - block * kBlockRows), scratch.get());
  });
}

// Multiplies a block's strips with every panel; epilogue(tile, first row of the tile, rows, first column).
template <typename T, typename Epilogue>
inline void multiply_block(const uint32_t* strips, const uint32_t* panels, int64_t rows, int64_t count, int64_t columns,
                           Epilogue&& epilogue) {
  for (int64_t column = 0; column < columns; column += kColumns)
    for (int64_t row = 0; row < rows; row += kRows) {
      Tile<T> tile;
      multiply_strip(tile, strips + row * count, panels + column * count, count);
      epilogue(tile, row, int(std::min<int64_t>(kRows, rows - row)), column);
    }
}

// The columns of a register tile that are in use: body(which vector, its first column, lanes).
template <typename Body>
inline void for_vectors(int64_t column, int64_t columns, Body&& body) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t c = column + h * kLanes;
    if (c + kLanes <= columns)
      body(h, c, kLanes);
    else if (c < columns)
      body(h, c, int(columns - c));
  }
}

// `tiles`: where the moments of each block of the stored output go, as merge_tiles() takes them; or null.
template <typename T>
void forward(T* out, double* tiles, const RowsOf<T>& x, const T* weight, const float* bias, const T* residual,
             ConvShape s, BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  const int64_t count = WordOf<T>::words(s.ci), columns = round_up(s.co, kColumns);
  const Words panels(count * columns);
  parallel_for(0, columns / kColumns, 1, [&](int64_t begin, int64_t end) {
    pack_transposed(panels.get(), weight, begin * kColumns, end * kColumns, s.co, s.ci);
  });
  for_blocks(s.pixels(), kBlockRows * count, [&](int64_t first, int64_t rows, uint32_t* strips) {
    const Scratch<T> room(x.room(rows));
    const T* const from = x.at(first, rows, room.get());
    const Scratch<double> sums(tiles ? BlockMoments::scratch(s.co) : 0);
    BlockMoments moments(sums.get(), s.co);
    prefetch_values<true>(out + first * s.co, rows * s.co);
    if (residual) prefetch_values<false>(residual + first * s.co, rows * s.co);
    pack_strips<T>(strips, rows, s.ci, [&](int64_t row, int64_t c, int lanes) {
      const Vec<float> value = load(from + row * s.ci + c, lanes);
      return relu(fma(value, load(table.scale + c, lanes), load(table.shift + c, lanes)));
    });
    multiply_block<T>(strips, panels.get(), rows, count, s.co, [&](Tile<T>& tile, int64_t row, int n, int64_t column) {
      for_vectors(column, s.co, [&](int h, int64_t c, int lanes) {
        const Vec<float> added = bias ? load(bias + c, lanes) : Vec<float>{};
        for (int r = 0; r < n; ++r) {
          const int64_t at = (first + row + r) * s.co + c;
          Vec<float>& y = tile.at[r][h];
          y += added;
          if (residual) y += load(residual + at, lanes);
          store(out + at, y, lanes);
          y = rounded_to<T>(y);  // the moments are of what is stored
        }
        if (tiles) moments.add(n, c, lanes, row == 0, [&](int r) { return tile.at[r][h]; });
      });
    });
    if (tiles) moments.leave(tiles + first / kBlockRows * 3 * s.co, s.co);
  });
}

// dz = (dout * weight) where z > 0, and per block of pixels the sums of dz and dz * (x - mean).
template <typename T>
void data_gradient(T* dz, float* partial, const T* dout, const RowsOf<T>& x, const T* weight, ConvShape s,
                   BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  const int64_t count = WordOf<T>::words(s.co);
  const Words panels(count * round_up(s.ci, kColumns));
  pack_rows(panels.get(), weight, s.co, s.ci);
  for_blocks(s.pixels(), kBlockRows * count, [&](int64_t first, int64_t rows, uint32_t* strips) {
    float* const sums = partial + first / kBlockRows * 2 * s.ci;
    std::fill_n(sums, 2 * s.ci, 0.0f);
    const Scratch<T> room(x.room(rows));
    const T* const from = x.at(first, rows, room.get());
    if (s.ci > 2 * kColumns) {  // a panel takes a small part of each row, which the processor does not foresee
      prefetch_values<false>(from, rows * s.ci);
      prefetch_values<true>(dz + first * s.ci, rows * s.ci);
    }
    pack_strips<T>(strips, rows, s.co,
                   [&](int64_t row, int64_t c, int lanes) { return load(dout + (first + row) * s.co + c, lanes); });
    multiply_block<T>(strips, panels.get(), rows, count, s.ci, [&](Tile<T>& tile, int64_t row, int n, int64_t column) {
      for_vectors(column, s.ci, [&](int h, int64_t c, int lanes) {
        Vec<float> s0 = load(sums + c, lanes), s1 = load(sums + s.ci + c, lanes);
        const Vec<float> scale = load(table.scale + c, lanes), shift = load(table.shift + c, lanes);
        const Vec<float> mean = load(bn.mean + c, lanes);
        for (int r = 0; r < n; ++r) {
          const Vec<float> value = load(from + (row + r) * s.ci + c, lanes);
          const Vec<float> masked = relu_backward(tile.at[r][h], fma(value, scale, shift));
          store(dz + (first + row + r) * s.ci + c, masked, lanes);
          const Vec<float> stored = rounded_to<T>(masked);  // the sums are of what the next pass reads
          s0 += stored;
          s1 = fma(stored, value - mean, s1);
        }
        store(sums + c, s0, lanes);
        store(sums + s.ci + c, s1, lanes);
      });
    });
  });
}

// An activation that is none: x is packed as it is.
struct Identity {};

// A vector of words of pixels `even` and `odd` (null for zeros) from channel c on, activated.
template <typename T, typename Activate>
inline Bits32 pixel_words(const T* even, const T* odd, int64_t c, int lanes, Activate&& activate) {
  constexpr bool is_identity = std::is_same_v<std::decay_t<Activate>, Identity>;
  if constexpr (WordOf<T>::is_pair && is_identity) {  // halves are moved, not computed with
    Half16 low{}, high{};
    if (even) std::memcpy(&low, even + c, size_t(lanes) * sizeof(T));
    if (odd) std::memcpy(&high, odd + c, size_t(lanes) * sizeof(T));
    return widen(low) | (widen(high) << 16);
  } else {
    const auto value = [&](const T* p) {
      if constexpr (is_identity)
        return p ? load(p + c, lanes) : Vec<float>{};
      else
        return p ? activate(load(p + c, lanes), c, lanes) : Vec<float>{};
    };
    if constexpr (WordOf<T>::is_pair)
      return interleave(value(even), value(odd));
    else
      return bits_of(value(even));
  }
}

// `rows` x `channels` values with the rows as the summed dimension: panels [channels / kWidth][kPanelWords][kWidth].
// pixel(row) is where a row's values are, null for a row of zeros.
template <int kWidth, typename T, typename Pixel, typename Activate>
inline void pack_pixels(uint32_t* panels, int64_t rows, int64_t channels, Pixel&& pixel, Activate&& activate) {
  constexpr int values = WordOf<T>::values;
  const int64_t count = divide_up(rows, values);
  for (int64_t word = 0; word < count; ++word) {
    const T* const even = pixel(word * values);
    const T* const odd = values == 2 && word * 2 + 1 < rows ? pixel(word * 2 + 1) : nullptr;
    const auto write = [&](int64_t c, Bits32 words) {
      std::memcpy(panels + (c / kWidth * kPanelWords + word) * kWidth + c % kWidth, &words, sizeof words);
    };
    for_lanes<float>(channels, [&](int64_t c, int lanes) { write(c, pixel_words(even, odd, c, lanes, activate)); });
    for (int64_t c = round_up(channels, kLanes); c < round_up(channels, kWidth); c += kLanes) write(c, Bits32{});
  }
}

// Adds one step of the weight gradient: dweight[:, tap] += gradient^T * activation over `count` words of pixels.
template <typename T>
inline void add_products(float* dweight, const uint32_t* gradient, const uint32_t* activation, int64_t count,
                         int64_t tap, ConvShape s) {
  const int64_t row_size = s.taps() * s.ci;
  for (int64_t column = 0; column < s.ci; column += kColumns)
    for (int64_t row = 0; row < s.co; row += kGradientRows) {
      Tile<T, kGradientRows> tile;  // each step's sum starts at 0: short sums round less than one long one
      multiply_columns(tile, gradient + row / kChunk * kPanelWords * kChunk + row % kChunk,
                       activation + column * kPanelWords, count);
      for_vectors(column, s.ci, [&](int h, int64_t c, int lanes) {
        float* const at = dweight + row * row_size + tap * s.ci + c;
#pragma GCC unroll 8
        for (int r = 0; r < kGradientRows; ++r) {
          if (row + r >= s.co) break;
          float* const sum = at + r * row_size;
          store(sum, load(sum, lanes) + tile.at[r][h], lanes);
        }
      });
    }
}

// dweight (co, taps, ci) and dbias over the output pixels [first, last).
template <typename T, typename Activate>
void weight_gradient_part(float* dweight, float* dbias, const T* dout, const RowsOf<T>& x, int64_t first, int64_t last,
                          ConvShape s, Activate&& activate) {
  constexpr int64_t step = kGradientWords * WordOf<T>::values;
  const Words activation(kPanelWords * round_up(s.ci, kColumns)), gradient(kPanelWords * round_up(s.co, kChunk));
  const Scratch<T> room(x.room(step));
  struct Corner {
    int64_t image, y, x;  // the input pixel under an output pixel's first tap
  } corners[step];
  for (int64_t begin = first; begin < last; begin += step) {
    const int64_t rows = std::min(step, last - begin), count = divide_up(rows, WordOf<T>::values);
    pack_pixels<kChunk, T>(
        gradient.get(), rows, s.co, [&](int64_t row) { return dout + (begin + row) * s.co; }, Identity{});
    if (dbias)
      for_lanes<float>(s.co, [&](int64_t c, int lanes) {
        Vec<float> sum{};
        for (int64_t row = 0; row < rows; ++row) sum += load(dout + (begin + row) * s.co + c, lanes);
        store(dbias + c, load(dbias + c, lanes) + sum, lanes);
      });
    if (s.is_pointwise()) {
      const T* const from = x.at(begin, rows, room.get());
      pack_pixels<kColumns, T>(activation.get(), rows, s.ci, [&](int64_t row) { return from + row * s.ci; }, activate);
      add_products<T>(dweight, gradient.get(), activation.get(), count, 0, s);
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = begin + row;
      corners[row] = {at / (s.ho * s.wo), at / s.wo % s.ho * s.stride_h - s.pad_h, at % s.wo * s.stride_w - s.pad_w};
    }
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const auto pixel = [&](int64_t row) -> const T* {
        const int64_t y = corners[row].y + tap / s.kw, x_in = corners[row].x + tap % s.kw;
        if (y < 0 || y >= s.h || x_in < 0 || x_in >= s.w) return nullptr;  // padding, after the ReLU
        return x.data() + ((corners[row].image * s.h + y) * s.w + x_in) * s.ci;
      };
      pack_pixels<kColumns, T>(activation.get(), rows, s.ci, pixel, activate);
      add_products<T>(dweight, gradient.get(), activation.get(), count, tap, s);
    }
  }
}

template <typename T, typename Activate>
void weight_gradient(T* dweight, float* dbias, const T* dout, const RowsOf<T>& x, ConvShape s, Activate&& activate) {
  // The pixels in as many parts as there are threads, then the parts' sums in order.
  constexpr int64_t step = kGradientWords * WordOf<T>::values;
  const int64_t size = s.co * s.taps() * s.ci, steps = divide_up(s.pixels(), step);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(max_threads(), steps));
  const WeightParts sums(parts, size, s.co);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(sums.dweight(part), size + s.co, 0.0f);
      weight_gradient_part(sums.dweight(part), dbias ? sums.dbias(part) : nullptr, dout, x,
                           std::min(s.pixels(), steps * part / parts * step),
                           std::min(s.pixels(), steps * (part + 1) / parts * step), s, activate);
    }
  });
  sums.add_up(dweight, dbias);
}

}  // namespace

bool conv_supported(DType dtype, ConvShape s) {
  return dtype != DType::f64 && std::min(s.ci, s.co) >= 16 && s.pixels() > 0;
}

void conv1x1_forward(void* out, float* out_mean, float* out_var, double* exact, Rows x, const void* weight,
                     const float* bias, const void* residual, DType dtype, ConvShape s, BatchNorm<void> bn) {
  const int64_t blocks = divide_up(s.pixels(), kBlockRows);
  std::vector<double> tiles(out_mean ? size_t(blocks * 3 * s.co) : 0);
  with_float_acc(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    forward(static_cast<T*>(out), out_mean ? tiles.data() : nullptr, RowsOf<T>(x, s.ci), static_cast<const T*>(weight),
            bias, static_cast<const T*>(residual), s, typed<float>(bn));
  });
  if (out_mean)
    merge_tiles(out_mean, out_var, exact, tiles.data(), blocks, s.co,
                [&](int64_t block) { return std::min(kBlockRows, s.pixels() - block * kBlockRows); });
}

void conv1x1_data_gradient(void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, Rows x, const void* weight,
                           DType dtype, ConvShape s, BatchNorm<void> bn) {
  with_float_acc(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t blocks = divide_up(s.pixels(), kBlockRows);
    std::vector<float> partial(size_t(blocks * 2 * s.ci));
    data_gradient(static_cast<T*>(dz), partial.data(), static_cast<const T*>(dout), RowsOf<T>(x, s.ci),
                  static_cast<const T*>(weight), s, typed<float>(bn));
    finish_sums(sum_dz, sum_dz_xhat, partial.data(), blocks, s.ci, typed<float>(bn));
  });
}

void conv_weight_gradient(void* dweight, float* dbias, const void* dout, Rows x, DType dtype, ConvShape s,
                          const BatchNorm<void>* bn) {
  with_float_acc(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto run = [&](auto&& activate) {
      weight_gradient(static_cast<T*>(dweight), dbias, static_cast<const T*>(dout), RowsOf<T>(x, s.ci), s, activate);
    };
    if (!bn) return run(Identity{});
    const ScaleShiftTable<float> table(typed<float>(*bn), s.ci);
    run([&](Vec<float> v, int64_t c, int lanes) {
      return relu(fma(v, load(table.scale + c, lanes), load(table.shift + c, lanes)));
    });
  });
}

#else  // no AVX2: the convolution goes to ATen

bool conv_supported(DType, ConvShape) { return false; }
void conv1x1_forward(void*, float*, float*, double*, Rows, const void*, const float*, const void*, DType, ConvShape,
                     BatchNorm<void>) {}
void conv1x1_data_gradient(void*, float*, float*, const void*, Rows, const void*, DType, ConvShape, BatchNorm<void>) {}
void conv_weight_gradient(void*, float*, const void*, Rows, DType, ConvShape, const BatchNorm<void>*) {}

#endif

}  // namespace ran::cpu::RAN_ISA
