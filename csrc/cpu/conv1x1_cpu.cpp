// 1x1 convolutions of channels_last tensors as matrix products, for AVX-512: batch normalisation and ReLU are applied while
// the operand is packed, and bias, residual, the ReLU's mask and the two sums of batch normalisation's backward ride in the
// epilogue, so that the activation is never written out.
#include <algorithm>
#include <memory>
#include <vector>

#include "gemm.h"
#include "kernels_isa.h"
#include "parallel.h"
#include "tables.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {

#if defined(__AVX512F__)

namespace {

constexpr int64_t kBlockRows = 64;     // pixels of one task: its packed operand stays in a core's second-level cache
constexpr int64_t kGradientRows = 128;  // pixels of one step of the weight gradient

using Words = std::unique_ptr<uint32_t[]>;
Words words(int64_t count) { return Words(new uint32_t[size_t(count)]); }

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

// Pixels [begin, end) in blocks of kBlockRows, shared among the threads; body(first row, rows, scratch of `size` words).
template <typename Body>
void for_blocks(int64_t m, int64_t size, Body&& body) {
  parallel_for(0, (m + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
    const Words scratch = words(size);
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

template <typename T>
void forward(T* out, const T* x, const T* weight, const float* bias, const T* residual, Conv1x1Shape s, BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  const int64_t count = s.ci / WordOf<T>::values;
  const Words panels = words(count * s.co);
  parallel_for(0, s.co / kColumns, 1, [&](int64_t begin, int64_t end) {
    pack_transposed(panels.get() + begin * kColumns * count, reinterpret_cast<const uint32_t*>(weight) + begin * kColumns * count,
                    (end - begin) * kColumns, count);
  });
  for_blocks(s.m, kBlockRows * count, [&](int64_t first, int64_t rows, uint32_t* strips) {
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
  });
}

// dz = (dout * weight) where z > 0, and per block of pixels the sums of dz and dz * (x - mean).
template <typename T>
void data_gradient(T* dz, float* partial, const T* dout, const T* x, const T* weight, Conv1x1Shape s, BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  const int64_t count = s.co / WordOf<T>::values;
  const Words panels = words(count * s.ci);
  pack_rows(panels.get(), weight, s.co, s.ci);
  for_blocks(s.m, kBlockRows * count, [&](int64_t first, int64_t rows, uint32_t* strips) {
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

// `rows` x `channels` values with the rows as the summed dimension: panels [channels / width][row words][width].
template <typename T, typename Value>
inline void pack_pixels(uint32_t* panels, int64_t rows, int64_t channels, int64_t width, Value&& value) {
  constexpr int values = WordOf<T>::values;
  const int64_t count = (rows + values - 1) / values;
  for (int64_t word = 0; word < count; ++word)
    for (int64_t c = 0; c < channels; c += kChunk) {
      Bits32 out;
      if constexpr (values == 1) {
        out = bits_of(value(word, c));
      } else {
        const int64_t row = word * 2;
        out = interleave(value(row, c), row + 1 < rows ? value(row + 1, c) : Vec<float>{});
      }
      std::memcpy(panels + (c / width * count + word) * width + c % width, &out, sizeof out);
    }
}

// dweight (co, ci) += dout^T * relu(bn(x)) over pixels [first, last); dbias likewise.
template <typename T>
void weight_gradient_part(float* dweight, float* dbias, const T* dout, const T* x, int64_t first, int64_t last, Conv1x1Shape s,
                          const ScaleShiftTable<float>& table) {
  const int64_t most = kGradientRows / WordOf<T>::values;
  const Words activation = words(most * s.ci), gradient = words(most * s.co);
  for (int64_t begin = first; begin < last; begin += kGradientRows) {
    const int64_t rows = std::min(kGradientRows, last - begin);
    const int64_t count = (rows + WordOf<T>::values - 1) / WordOf<T>::values;
    pack_pixels<T>(activation.get(), rows, s.ci, kColumns, [&](int64_t row, int64_t c) {
      return relu(fma(load(x + (begin + row) * s.ci + c), load(table.scale + c), load(table.shift + c)));
    });
    pack_pixels<T>(gradient.get(), rows, s.co, s.co, [&](int64_t row, int64_t c) { return load(dout + (begin + row) * s.co + c); });
    if (dbias)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < s.co; c += kChunk) store(dbias + c, load(dbias + c) + load(dout + (begin + row) * s.co + c));
    for (int64_t column = 0; column < s.ci; column += kColumns)
      for (int64_t row = 0; row < s.co; row += kRows) {
        Tile<T> tile;
        float* const at = dweight + row * s.ci + column;
        for (int r = 0; r < kRows; ++r)
          for (int h = 0; h < 2; ++h) tile.at[r][h] = load(at + r * s.ci + h * 16);
        multiply_columns(tile, gradient.get() + row, s.co, activation.get() + column * count, count);
        for (int r = 0; r < kRows; ++r)
          for (int h = 0; h < 2; ++h) store(at + r * s.ci + h * 16, tile.at[r][h]);
      }
  }
}

template <typename T>
void weight_gradient(T* dweight, float* dbias, const T* dout, const T* x, Conv1x1Shape s, BatchNorm<float> bn) {
  const ScaleShiftTable<float> table(bn, s.ci);
  // The pixels in as many parts as there are threads, then the parts' sums in order.
  const int64_t size = s.co * s.ci, steps = (s.m + kGradientRows - 1) / kGradientRows;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(max_threads(), steps));
  std::vector<float> sums(size_t(parts * (size + s.co)), 0.0f);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const at = sums.data() + part * (size + s.co);
      weight_gradient_part(at, dbias ? at + size : nullptr, dout, x, std::min(s.m, steps * part / parts * kGradientRows),
                           std::min(s.m, steps * (part + 1) / parts * kGradientRows), s, table);
    }
  });
  const auto add_up = [&](int64_t i) {
    Vec<float> total = load(sums.data() + i);
    for (int64_t part = 1; part < parts; ++part) total += load(sums.data() + part * (size + s.co) + i);
    return total;
  };
  for (int64_t i = 0; i < size; i += kChunk) store(dweight + i, add_up(i));
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

bool conv1x1_supported(DType dtype, Conv1x1Shape s) {
#if defined(__AVX512BF16__)
  const bool has_dtype = dtype == DType::f32 || dtype == DType::bf16;
#else
  const bool has_dtype = dtype == DType::f32;
#endif
  return has_dtype && s.ci % kColumns == 0 && s.co % kColumns == 0 && s.m > 0;
}

void conv1x1_forward(void* out, const void* x, const void* weight, const float* bias, const void* residual, DType dtype,
                     Conv1x1Shape s, BatchNorm<void> bn) {
  with_gemm_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    forward(static_cast<T*>(out), static_cast<const T*>(x), static_cast<const T*>(weight), bias,
            static_cast<const T*>(residual), s, typed<float>(bn));
  });
}

void conv1x1_backward(void* dz, float* sum_dz, float* sum_dz_xhat, void* dweight, float* dbias, const void* dout,
                      const void* x, const void* weight, DType dtype, Conv1x1Shape s, BatchNorm<void> bn) {
  with_gemm_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t blocks = (s.m + kBlockRows - 1) / kBlockRows;
    std::vector<float> partial(size_t(blocks * 2 * s.ci));
    data_gradient(static_cast<T*>(dz), partial.data(), static_cast<const T*>(dout), static_cast<const T*>(x),
                  static_cast<const T*>(weight), s, typed<float>(bn));
    finish_sums(sum_dz, sum_dz_xhat, partial.data(), blocks, s.ci, typed<float>(bn));
    weight_gradient(static_cast<T*>(dweight), dbias, static_cast<const T*>(dout), static_cast<const T*>(x), s,
                    typed<float>(bn));
  });
}

#else  // no AVX-512: the convolution goes to ATen

bool conv1x1_supported(DType, Conv1x1Shape) { return false; }
void conv1x1_forward(void*, const void*, const void*, const float*, const void*, DType, Conv1x1Shape, BatchNorm<void>) {}
void conv1x1_backward(void*, float*, float*, void*, float*, const void*, const void*, const void*, DType, Conv1x1Shape,
                      BatchNorm<void>) {}

#endif

}  // namespace ran::cpu::RAN_ISA
