// The matrix product under the 1x1 convolutions, for AVX-512: register tiles of 8 x 32 over packed operands.
//
// A "word" is 32 bits: one float, or a pair of bfloat16 along the summed dimension that one vdpbf16ps instruction
// multiplies and adds. Both dtypes then share every layout and loop:
//   A strip  [K / 16][8 rows][16 words]   broadcast word by word
//   B panel  [K][32 columns]              two vectors a step
#pragma once

#include <algorithm>

#include "vec.h"

#if defined(__AVX512F__)

namespace ran::cpu::RAN_ISA {

constexpr int kRows = 8;      // of a register tile
constexpr int kColumns = 32;  // of a register tile: two vectors
constexpr int kChunk = 16;    // words of one A vector

template <typename T>
struct WordOf {
  static constexpr int values = 4 / int(sizeof(T));  // along the summed dimension
};

template <typename T>
struct Tile {
  Vec<float> at[kRows][2];
};

template <typename T>
inline Vec<float> multiply_add(Vec<float> sum, uint32_t a, const uint32_t* b) {
  const __m512i broadcast = _mm512_set1_epi32(int(a));
  const __m512i column = _mm512_loadu_si512(b);
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(broadcast), _mm512_castsi512_ps(column), sum);
  } else {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)broadcast, (__m512bh)column);
#else
    return sum;  // not reached: conv1x1_supported() says no
#endif
  }
}

// tile += A strip * B panel, over `words` (a multiple of 16).
template <typename T>
inline void multiply_strip(Tile<T>& tile, const uint32_t* a, const uint32_t* b, int64_t words) {
  for (int64_t k = 0; k < words; k += kChunk, a += kRows * kChunk) {
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i, b += kColumns) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        tile.at[r][0] = multiply_add<T>(tile.at[r][0], a[r * kChunk + i], b);
        tile.at[r][1] = multiply_add<T>(tile.at[r][1], a[r * kChunk + i], b + 16);
      }
    }
  }
}

// tile += A^T * B, A being [words][16] with the tile's 8 rows side by side, a line of the cache a word: the weight
// gradient, summed over pixels.
template <typename T>
inline void multiply_columns(Tile<T>& tile, const uint32_t* a, const uint32_t* b, int64_t words) {
  for (int64_t k = 0; k < words; ++k, a += kChunk, b += kColumns) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      tile.at[r][0] = multiply_add<T>(tile.at[r][0], a[r], b);
      tile.at[r][1] = multiply_add<T>(tile.at[r][1], a[r], b + 16);
    }
  }
}

inline Bits32 bits_of(Vec<float> v) {
  Bits32 bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// Two rows of values as words: row `even` in the low halves, `odd` in the high ones.
inline Bits32 interleave(Vec<float> even, Vec<float> odd) {
  return __builtin_convertvector(to_bf16(even), Bits32) | (__builtin_convertvector(to_bf16(odd), Bits32) << 16);
}

// The transpose of a weight (n, k words): panels [n / 32][k][32].
inline void pack_transposed(uint32_t* panels, const uint32_t* weight, int64_t n, int64_t k) {
  for (int64_t column = 0; column < n; ++column) {
    uint32_t* const out = panels + column / kColumns * k * kColumns + column % kColumns;
    for (int64_t i = 0; i < k; ++i) out[i * kColumns] = weight[column * k + i];
  }
}

// A weight (k values, n) as panels [n / 32][k words][32].
template <typename T>
inline void pack_rows(uint32_t* panels, const T* weight, int64_t k, int64_t n) {
  constexpr int values = WordOf<T>::values;
  for (int64_t word = 0; word < k / values; ++word)
    for (int64_t column = 0; column < n; column += kChunk) {
      const T* const row = weight + word * values * n + column;
      Bits32 words;
      if constexpr (values == 1)
        words = bits_of(load(row));
      else
        words = interleave(load(row), load(row + n));
      std::memcpy(panels + (column / kColumns * (k / values) + word) * kColumns + column % kColumns, &words,
                  sizeof words);
    }
}

}  // namespace ran::cpu::RAN_ISA

#endif  // __AVX512F__
