// The matrix product under the 1x1 convolutions and the weight gradients: register tiles of some rows x two vectors
// over packed operands, for vectors of 128 to 512 bits.
//
// A "word" is 32 bits: one float, or, where the processor multiplies bfloat16, a pair of them along the summed
// dimension that one vdpbf16ps instruction multiplies and adds. Other 16-bit values become floats as they are packed.
// All then share every layout and loop:
//   A strip  [K / kChunk][kRows][kChunk words]   broadcast word by word
//   B panel  [K][kColumns]                       two vectors a step
// What is missing to a whole strip, panel or chunk is filled up with zeros.
#pragma once

#include <algorithm>

#include "vec.h"

#if defined(RAN_FMA)

namespace ran::cpu::RAN_ISA {

// Rows of a register tile: as many as the registers hold beside two vectors of B and one of A.
constexpr int kRows = kBytes == 64 ? 8 : kBytes == 32 ? 6 : 4;
constexpr int kGradientRows = kBytes == 64 ? 8 : 4;  // of the weight gradient's: a chunk holds a whole number of them
constexpr int kColumns = 2 * kLanes;                 // of a register tile
constexpr int kChunk = kLanes;                       // words of one A vector

template <typename T>
struct WordOf {
#if defined(RAN_BF16_PAIRS)
  static constexpr bool is_pair = std::is_same_v<T, bf16>;
#else
  static constexpr bool is_pair = false;
#endif
  static constexpr int values = is_pair ? 2 : 1;  // along the summed dimension
  // Words that hold `count` values; a whole number of chunks.
  static int64_t words(int64_t count) { return round_up((count + values - 1) / values, kChunk); }
};

template <typename T, int kHeight = kRows>
struct Tile {
  Vec<float> at[kHeight][2];
};

inline Vec<float> floats_of(Bits32 bits) {
  Vec<float> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline Bits32 bits_of(Vec<float> v) {
  Bits32 bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

#if defined(RAN_BF16_PAIRS)
// sum + a's two bfloat16 times b's, lane by lane.
inline Vec<float> multiply_add_pairs(Vec<float> sum, Bits32 a, Bits32 b) {
#if defined(RAN_AVX512)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const uint32_t high = 0xffff0000u;
  return fma(floats_of(a << 16), floats_of(b << 16), fma(floats_of(a & high), floats_of(b & high), sum));
#endif
}
#endif

template <typename T>
inline Vec<float> multiply_add(Vec<float> sum, uint32_t a, const uint32_t* b) {
  Bits32 column;
  std::memcpy(&column, b, sizeof column);
  const Bits32 broadcast = a - Bits32{};
#if defined(RAN_BF16_PAIRS)
  if constexpr (WordOf<T>::is_pair) return multiply_add_pairs(sum, broadcast, column);
#endif
  return fma(floats_of(broadcast), floats_of(column), sum);
}

// A strip * B panel, over `words` (a multiple of kChunk).
template <typename T>
inline void multiply_strip(Tile<T>& tile, const uint32_t* a, const uint32_t* b, int64_t words) {
  Vec<float> sum[kRows][2];
  RAN_UNROLL for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = Vec<float>{};
  for (int64_t k = 0; k < words; k += kChunk, a += kRows * kChunk) {
    RAN_UNROLL for (int i = 0; i < kChunk; ++i, b += kColumns) {
      RAN_UNROLL for (int r = 0; r < kRows; ++r) {
        sum[r][0] = multiply_add<T>(sum[r][0], a[r * kChunk + i], b);
        sum[r][1] = multiply_add<T>(sum[r][1], a[r * kChunk + i], b + kLanes);
      }
    }
  }
  RAN_UNROLL for (int r = 0; r < kRows; ++r) tile.at[r][0] = sum[r][0], tile.at[r][1] = sum[r][1];
}

// A^T * B, A being [words][kChunk] with the tile's rows side by side, a vector a word: the weight gradient, summed over
// pixels.
template <typename T>
inline void multiply_columns(Tile<T, kGradientRows>& tile, const uint32_t* a, const uint32_t* b, int64_t words) {
  Vec<float> sum[kGradientRows][2];
  RAN_UNROLL for (int r = 0; r < kGradientRows; ++r) sum[r][0] = sum[r][1] = Vec<float>{};
  for (int64_t k = 0; k < words; ++k, a += kChunk, b += kColumns) {
    RAN_UNROLL for (int r = 0; r < kGradientRows; ++r) {
      sum[r][0] = multiply_add<T>(sum[r][0], a[r], b);
      sum[r][1] = multiply_add<T>(sum[r][1], a[r], b + kLanes);
    }
  }
  RAN_UNROLL for (int r = 0; r < kGradientRows; ++r) tile.at[r][0] = sum[r][0], tile.at[r][1] = sum[r][1];
}

// Two rows of values as words: row `even` in the low halves, `odd` in the high ones.
inline Bits32 interleave(Vec<float> even, Vec<float> odd) { return widen(to_bf16(even)) | (widen(to_bf16(odd)) << 16); }

// The transpose of columns [begin, end) of a weight (columns, k values): panels [column / kColumns][k words][kColumns].
template <typename T>
inline void pack_transposed(uint32_t* panels, const T* weight, int64_t begin, int64_t end, int64_t columns, int64_t k) {
  constexpr int values = WordOf<T>::values;
  const int64_t count = WordOf<T>::words(k);
  for (int64_t column = begin; column < end; ++column) {
    uint32_t* const out = panels + column / kColumns * count * kColumns + column % kColumns;
    const T* const row = weight + column * k;
    const int64_t whole = column < columns ? k / values : 0;
    const auto word = [&](int64_t i, int n) {  // of n values
      uint32_t bits = 0;
      if constexpr (WordOf<T>::is_pair) {
        std::memcpy(&bits, row + i * values, size_t(n) * sizeof(T));
      } else {
        const float value = to_float(row[i]);
        std::memcpy(&bits, &value, sizeof bits);
      }
      return bits;
    };
    for (int64_t i = 0; i < whole; ++i) out[i * kColumns] = word(i, values);
    for (int64_t i = whole; i < count; ++i) out[i * kColumns] = column < columns && i * values < k ? word(i, 1) : 0;
  }
}

// A weight (k values, columns) as panels [column / kColumns][k words][kColumns].
template <typename T>
inline void pack_rows(uint32_t* panels, const T* weight, int64_t k, int64_t columns) {
  constexpr int values = WordOf<T>::values;
  const int64_t count = WordOf<T>::words(k);
  for (int64_t word = 0; word < count; ++word)
    for (int64_t column = 0; column < round_up(columns, kColumns); column += kLanes) {
      const int lanes = int(std::clamp<int64_t>(columns - column, 0, kLanes));
      const auto row = [&](int64_t i) {
        return i < k && lanes ? load(weight + i * columns + column, lanes) : Vec<float>{};
      };
      Bits32 words;
      if constexpr (WordOf<T>::is_pair)
        words = interleave(row(2 * word), row(2 * word + 1));
      else
        words = bits_of(row(word * values));
      std::memcpy(panels + (column / kColumns * count + word) * kColumns + column % kColumns, &words, sizeof words);
    }
}

}  // namespace ran::cpu::RAN_ISA

#endif  // RAN_FMA
