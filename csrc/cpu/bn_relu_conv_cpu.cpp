// Convolutions of channels_last tensors as matrix products, for AVX-512. For 1x1 ones batch normalisation and ReLU are
// applied while the operand is packed, and bias, residual, the ReLU's mask and the two sums of batch normalisation's
// backward ride in the epilogue, so that the activation is never written out. The weight gradient takes any kernel
// size, one tap at a time.
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "kernels_isa.h"
#include "moments.h"
#include "parallel.h"
#include "scratch.h"
#include "tables.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {

#if defined(__AVX512F__)

namespace {

constexpr int64_t kBlockRows = 64;       // pixels of one task: its packed operand stays in a core's second-level cache
constexpr int64_t kGradientWords = 128;  // words along the pixels in one step of the weight gradient

using Words = Scratch<uint32_t>;

// `rows` x `channels` values as A strips; value(row, channel) gives 16 of them as floats. Rows past the end are 0.
template <typename T, typename Value>
inline void pack_strips(uint32_t* strips, int64_t rows, int64_t channels, Value&& value) {
  constexpr int values = WordOf<T>::values;
  const int64_t count = channels / values;
  for (int64_t row = 0; row < (rows + kRows - 1) / kRows * kRows; ++row) {
    uint32_t* const strip = strips + row / kRows * kRows * count + row % kRows * kChunk;
    for (int64_t c = 0; c < channels; c += kChunk) {
      const Vec<float> v = row < rows ? value(row, c) : Vec<float>{};
      const int64_t word = c / values;
      T* const out = reinterpret_cast<T*>(strip + word / kChunk * kRows * kChunk) + c % (kChunk * values);
      store(out, v);
    }
  }
}

// Pixels [begin, end) in blocks of kBlockRows, shared among the threads; body(first row, rows, scratch of `size`
// words).
template <typename Body>
void for_blocks(int64_t m, int64_t size, Body&& body) {
  parallel_for(0, (m + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
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
      Tile<T> tile{};
      multiply_strip(tile, strips + row * count, panels + column * count, count);
      epilogue(tile, row, int(std::min<int64_t>(kRows, rows - row)), column);
    }
}

// `tiles`: where the moments of each block of the stored output go, as merge_tiles() takes them; or null.
template <typename T>
void forward(T* out, double* tiles, const T* x, const T* weight, const float* bias, const T* residual, ConvShape s,
             BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  const int64_t count = s.ci / WordOf<T>::values;
  const Words panels(count * s.co);
  parallel_for(0, s.co / kColumns, 1, [&](int64_t begin, int64_t end) {
    pack_transposed(panels.get() + begin * kColumns * count,
                    reinterpret_cast<const uint32_t*>(weight) + begin * kColumns * count, (end - begin) * kColumns,
                    count);
  });
  for_blocks(s.pixels(), kBlockRows * count, [&](int64_t first, int64_t rows, uint32_t* strips) {
    pack_strips<T>(strips, rows, s.ci, [&](int64_t row, int64_t c) {
      return relu(fma(load(x + (first + row) * s.ci + c), load(table.scale + c), load(table.shift + c)));
    });
    multiply_block<T>(strips, panels.get(), rows, count, s.co, [&](Tile<T>& tile, int64_t row, int n, int64_t column) {
      for (int r = 0; r < n; ++r)
        for (int h = 0; h < 2; ++h) {
          const int64_t at = (first + row + r) * s.co + column + h * 16;
          Vec<float> y = tile.at[r][h];
          if (bias) y += load(bias + column + h * 16);
          if (residual) y += load(residual + at);
          store(out + at, y);
        }
    });
    // The block is still in the cache.
    if (tiles) tile_moments(tiles + first / kBlockRows * 3 * s.co, out, s.co, first, rows, 0, s.co);
  });
}

// dz = (dout * weight) where z > 0, and per block of pixels the sums of dz and dz * (x - mean).
template <typename T>
void data_gradient(T* dz, float* partial, const T* dout, const T* x, const T* weight, ConvShape s,
                   BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  const int64_t count = s.co / WordOf<T>::values;
  const Words panels(count * s.ci);
  pack_rows(panels.get(), weight, s.co, s.ci);
  for_blocks(s.pixels(), kBlockRows * count, [&](int64_t first, int64_t rows, uint32_t* strips) {
    float* const sums = partial + first / kBlockRows * 2 * s.ci;
    std::fill_n(sums, 2 * s.ci, 0.0f);
    pack_strips<T>(strips, rows, s.co, [&](int64_t row, int64_t c) { return load(dout + (first + row) * s.co + c); });
    multiply_block<T>(strips, panels.get(), rows, count, s.ci, [&](Tile<T>& tile, int64_t row, int n, int64_t column) {
      for (int h = 0; h < 2; ++h) {
        const int64_t c = column + h * 16;
        Vec<float> s0 = load(sums + c), s1 = load(sums + s.ci + c);
        const Vec<float> scale = load(table.scale + c), shift = load(table.shift + c), mean = load(bn.mean + c);
        for (int r = 0; r < n; ++r) {
          const int64_t at = (first + row + r) * s.ci + c;
          const Vec<float> value = load(x + at);
          const Vec<float> masked = fma(value, scale, shift) <= Vec<float>{} ? Vec<float>{} : tile.at[r][h];
          store(dz + at, masked);
          const Vec<float> stored = load(dz + at);  // the sums are of what the next pass reads
          s0 += stored;
          s1 = fma(stored, value - mean, s1);
        }
        store(sums + c, s0);
        store(sums + s.ci + c, s1);
      }
    });
  });
}

// An activation that is none: x is packed as it is.
struct Identity {};

// Sixteen words of pixels `even` and `odd` (null for zeros) from channel c on, activated.
template <typename T, typename Activate>
inline Bits32 pixel_words(const T* even, const T* odd, int64_t c, Activate&& activate) {
  constexpr bool is_identity = std::is_same_v<std::decay_t<Activate>, Identity>;
  if constexpr (WordOf<T>::values == 2 && is_identity) {  // halves are moved, not computed with
    Half16 low{}, high{};
    if (even) std::memcpy(&low, even + c, sizeof low);
    if (odd) std::memcpy(&high, odd + c, sizeof high);
    return __builtin_convertvector(low, Bits32) | (__builtin_convertvector(high, Bits32) << 16);
  } else {
    const auto value = [&](const T* p) {
      if constexpr (is_identity)
        return p ? load(p + c) : Vec<float>{};
      else
        return p ? activate(load(p + c), c) : Vec<float>{};
    };
    if constexpr (WordOf<T>::values == 1)
      return bits_of(value(even));
    else
      return interleave(value(even), value(odd));
  }
}

// `rows` x `channels` values with the rows as the summed dimension: panels [channels / width][row words][width].
// pixel(row) is where a row's values are, null for a row of zeros.
template <typename T, typename Pixel, typename Activate>
inline void pack_pixels(uint32_t* panels, int64_t rows, int64_t channels, int64_t width, Pixel&& pixel,
                        Activate&& activate) {
  constexpr int values = WordOf<T>::values;
  const int64_t count = (rows + values - 1) / values;
  for (int64_t word = 0; word < count; ++word) {
    const T* const even = pixel(word * values);
    const T* const odd = values == 2 && word * 2 + 1 < rows ? pixel(word * 2 + 1) : nullptr;
    for (int64_t c = 0; c < channels; c += kChunk) {
      const Bits32 out = pixel_words(even, odd, c, activate);
      std::memcpy(panels + (c / width * count + word) * width + c % width, &out, sizeof out);
    }
  }
}

// Adds one step of the weight gradient: dweight[:, tap] += gradient^T * activation over `count` words of pixels.
template <typename T>
inline void add_products(float* dweight, const uint32_t* gradient, const uint32_t* activation, int64_t count,
                         int64_t tap, ConvShape s) {
  const int64_t row_size = s.taps() * s.ci;
  for (int64_t column = 0; column < s.ci; column += kColumns)
    for (int64_t row = 0; row < s.co; row += kRows) {
      Tile<T> tile{};  // each step's sum starts at 0: short sums round less than one long one
      float* const at = dweight + row * row_size + tap * s.ci + column;
      multiply_columns(tile, gradient + row / kChunk * count * kChunk + row % kChunk, activation + column * count,
                       count);
      for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < 2; ++h) {
          float* const sum = at + r * row_size + h * 16;
          store(sum, load(sum) + tile.at[r][h]);
        }
    }
}

// dweight (co, taps, ci) and dbias over the output pixels [first, last).
template <typename T, typename Activate>
void weight_gradient_part(float* dweight, float* dbias, const T* dout, const T* x, int64_t first, int64_t last,
                          ConvShape s, Activate&& activate) {
  constexpr int64_t step = kGradientWords * WordOf<T>::values;
  const Words activation(kGradientWords * s.ci), gradient(kGradientWords * s.co);
  struct Corner {
    int64_t image, y, x;  // the input pixel under an output pixel's first tap
  } corners[step];
  for (int64_t begin = first; begin < last; begin += step) {
    const int64_t rows = std::min(step, last - begin), count = (rows + WordOf<T>::values - 1) / WordOf<T>::values;
    pack_pixels<T>(
        gradient.get(), rows, s.co, kChunk, [&](int64_t row) { return dout + (begin + row) * s.co; }, Identity{});
    if (dbias)
      for (int64_t c = 0; c < s.co; c += kChunk) {
        Vec<float> sum{};
        for (int64_t row = 0; row < rows; ++row) sum += load(dout + (begin + row) * s.co + c);
        store(dbias + c, load(dbias + c) + sum);
      }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = begin + row;
      corners[row] = {at / (s.ho * s.wo), at / s.wo % s.ho * s.stride_h - s.pad_h, at % s.wo * s.stride_w - s.pad_w};
    }
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const auto pixel = [&](int64_t row) -> const T* {
        const int64_t y = corners[row].y + tap / s.kw, x_in = corners[row].x + tap % s.kw;
        if (y < 0 || y >= s.h || x_in < 0 || x_in >= s.w) return nullptr;  // padding, after the ReLU
        return x + ((corners[row].image * s.h + y) * s.w + x_in) * s.ci;
      };
      pack_pixels<T>(activation.get(), rows, s.ci, kColumns, pixel, activate);
      add_products<T>(dweight, gradient.get(), activation.get(), count, tap, s);
    }
  }
}

template <typename T, typename Activate>
void weight_gradient(T* dweight, float* dbias, const T* dout, const T* x, ConvShape s, Activate&& activate) {
  // The pixels in as many parts as there are threads, then the parts' sums in order.
  constexpr int64_t step = kGradientWords * WordOf<T>::values;
  const int64_t size = s.co * s.taps() * s.ci, steps = (s.pixels() + step - 1) / step;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(max_threads(), steps));
  const Scratch<float> sums(parts * (size + s.co));
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const at = sums.get() + part * (size + s.co);
      std::fill_n(at, size + s.co, 0.0f);
      weight_gradient_part(at, dbias ? at + size : nullptr, dout, x, std::min(s.pixels(), steps * part / parts * step),
                           std::min(s.pixels(), steps * (part + 1) / parts * step), s, activate);
    }
  });
  const auto add_up = [&](int64_t i) {
    Vec<float> total = load(sums.get() + i);
    for (int64_t part = 1; part < parts; ++part) total += load(sums.get() + part * (size + s.co) + i);
    return total;
  };
  parallel_for(0, size / kChunk, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < end * kChunk; i += kChunk) store(dweight + i, add_up(i));
  });
  if (dbias)
    for (int64_t i = 0; i < s.co; i += kChunk) store(dbias + i, add_up(size + i));
}

// Calls f with a null pointer of the C++ type; only the dtypes that conv1x1_supported() admits come here.
template <typename F>
void with_gemm_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  f(static_cast<bf16*>(nullptr));
}

}  // namespace

bool conv_supported(DType dtype, ConvShape s) {
#if defined(__AVX512BF16__)
  const bool has_dtype = dtype == DType::f32 || dtype == DType::bf16;
#else
  const bool has_dtype = dtype == DType::f32;
#endif
  return has_dtype && s.ci % kColumns == 0 && s.co % kColumns == 0 && s.pixels() > 0;
}

void conv1x1_forward(void* out, float* out_mean, float* out_var, double* exact, const void* x, const void* weight,
                     const float* bias, const void* residual, DType dtype, ConvShape s, BatchNorm<void> bn) {
  const int64_t blocks = (s.pixels() + kBlockRows - 1) / kBlockRows;
  std::vector<double> tiles(out_mean ? size_t(blocks * 3 * s.co) : 0);
  with_gemm_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    forward(static_cast<T*>(out), out_mean ? tiles.data() : nullptr, static_cast<const T*>(x),
            static_cast<const T*>(weight), bias, static_cast<const T*>(residual), s, typed<float>(bn));
  });
  if (out_mean)
    merge_tiles(out_mean, out_var, exact, tiles.data(), blocks, s.co,
                [&](int64_t block) { return std::min(kBlockRows, s.pixels() - block * kBlockRows); });
}

void conv1x1_data_gradient(void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x,
                           const void* weight, DType dtype, ConvShape s, BatchNorm<void> bn) {
  with_gemm_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t blocks = (s.pixels() + kBlockRows - 1) / kBlockRows;
    std::vector<float> partial(size_t(blocks * 2 * s.ci));
    data_gradient(static_cast<T*>(dz), partial.data(), static_cast<const T*>(dout), static_cast<const T*>(x),
                  static_cast<const T*>(weight), s, typed<float>(bn));
    finish_sums(sum_dz, sum_dz_xhat, partial.data(), blocks, s.ci, typed<float>(bn));
  });
}

void conv_weight_gradient(void* dweight, float* dbias, const void* dout, const void* x, DType dtype, ConvShape s,
                          const BatchNorm<void>* bn) {
  with_gemm_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto run = [&](auto&& activate) {
      weight_gradient(static_cast<T*>(dweight), dbias, static_cast<const T*>(dout), static_cast<const T*>(x), s,
                      activate);
    };
    if (!bn) return run(Identity{});
    const ScaleShiftTable<float> table(typed<float>(*bn), s.ci);
    run([&](Vec<float> v, int64_t c) { return relu(fma(v, load(table.scale + c), load(table.shift + c))); });
  });
}

#else  // no AVX-512: the convolution goes to ATen

bool conv_supported(DType, ConvShape) { return false; }
void conv1x1_forward(void*, float*, float*, double*, const void*, const void*, const float*, const void*, DType,
                     ConvShape, BatchNorm<void>) {}
void conv1x1_data_gradient(void*, float*, float*, const void*, const void*, const void*, DType, ConvShape,
                           BatchNorm<void>) {}
void conv_weight_gradient(void*, float*, const void*, const void*, DType, ConvShape, const BatchNorm<void>*) {}

#endif

}  // namespace ran::cpu::RAN_ISA
