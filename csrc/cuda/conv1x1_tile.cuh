// Operands of the 1x1 convolutions: global memory to panels in shared memory, panels to mma fragments.
//
// A panel is rows of kPanel 16-bit values. The 16-byte vectors of row r are permuted by r % 8, so that the 8 rows of an
// ldmatrix, and the 8 vectors of a row that one cp.async instruction writes, fall on different banks.
#pragma once

#include <cstring>

#include "../common/formulas.h"
#include "conv1x1_plan.h"
#include "mma.cuh"
#include "pieces.cuh"
#include "vec.cuh"

namespace ran::cuda::conv1x1 {

// Which pixel of x an output pixel reads.
struct Pixels {
  int stride;
  unsigned h, w, out_h, out_w;

  __device__ __forceinline__ int64_t source(unsigned row) const {
    const unsigned image_row = row / out_w, column = row % out_w;
    const unsigned image = image_row / out_h, y = image_row % out_h;
    return (static_cast<int64_t>(image) * h + y * stride) * w + column * stride;
  }
};

inline Pixels input_pixels(const Conv1x1Shape& s) {
  return {s.stride, static_cast<unsigned>(s.h), static_cast<unsigned>(s.w), static_cast<unsigned>(s.out_h()),
          static_cast<unsigned>(s.out_w())};
}

// A dense row-major matrix, its rows possibly gathered. `columns` is a multiple of 8.
template <typename T>
struct Operand {
  const T* data;
  int rows, columns;
  Pixels pixels{1, 0, 0, 0, 0};
};

// x's first value, or that of its first piece.
template <typename T>
const T* first_of(const Rows& x) {
  return static_cast<const T*>(x.pieces ? x.pieces[0].data : x.data);
}

inline bool fits(const Rows& x, const Conv1x1Shape& s, const BatchNorm<float>& norm) {
  if (!s.pieces) return !x.pieces && aligned16(x.data);
  return x.pieces && reads_pieces(x) && norm.mean;
}

// A float's place in a row of shared memory of which each lane reads 8, in two halves: those of vectors 4 .. 7 of every
// 8 are kept the other way round, as lanes 4 apart would else meet on the same banks.
__device__ __forceinline__ int swapped_at(int column) { return column ^ column / 32 % 2 * 4; }

__device__ __forceinline__ void load_swapped(Shared<float> row, int vector, float (&v)[8]) {
  const int swapped = vector / 4 % 2 * 4;
  float low[4], high[4];
  load<4>(row + (8 * vector + swapped), low);
  load<4>(row + (8 * vector + 4 - swapped), high);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = low[i], v[i + 4] = high[i];
}

__device__ __forceinline__ int panel_at(int row, int vector) { return row * kPanel + ((vector ^ (row & 7)) << 3); }

// The threads' rows of a panel; a multiple of 8, so that all of a thread's are permuted alike.
inline constexpr int kStep = kThreads / 8;

// Asks for a thread's vectors, of every kStep-th of kRows rows that lie `pitch` values apart; zeros from the thread's
// row number `rows` on. `valid`: any address that may be formed.
template <int kRows, typename T>
__device__ __forceinline__ void copy_rows(Shared<T> to, const T* source, int64_t pitch, int rows, const T* valid) {
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    cp_async16(to + r * kPanel, r < rows ? source : valid, r < rows);
    source += kStep * pitch;
  }
}

// Asks for kRows x kPanel values from (row, column) on; zeros outside the matrix. Of a matrix whose rows are not
// gathered (kMayGather false, or stride 1) a row lies behind the other, and no index is divided.
template <int kRows, bool kMayGather, typename T>
__device__ __forceinline__ void copy_panel(Shared<T> panel, const Operand<T>& from, int first_row, int first_column) {
  const int vector = thread_rank() % 8, column = first_column + 8 * vector, row = first_row + thread_rank() / 8;
  const int rows = column < from.columns ? from.rows - row : 0;
  const Shared<T> to = panel + panel_at(thread_rank() / 8, vector);
  if (kMayGather && from.pixels.stride != 1) {
#pragma unroll 1
    for (int r = 0; r < kRows; r += kStep) {
      const bool inside = r < rows;
      const int64_t offset = inside ? from.pixels.source(row + r) * from.columns + column : 0;
      cp_async16(to + r * kPanel, from.data + offset, inside);
    }
  } else {
    copy_rows<kRows>(to, from.data + static_cast<int64_t>(row) * from.columns + column, from.columns, rows, from.data);
  }
}

// The same of rows in pieces: this thread's 8 columns lie at `column`. from.data: any of the pieces.
template <int kRows, typename T>
__device__ __forceinline__ void copy_column(Shared<T> panel, const Column<T>& column, const Operand<T>& from,
                                            int first_row, int first_column) {
  const int vector = thread_rank() % 8, row = first_row + thread_rank() / 8;
  const int rows = first_column + 8 * vector < from.columns ? from.rows - row : 0;
  copy_rows<kRows>(panel + panel_at(thread_rank() / 8, vector), column.data + row * column.pitch, column.pitch, rows,
                   from.data);
}

// A lane's row of the ldmatrix that loads four 8x8 matrices of a 16x16 block of a panel: in the order (upper left,
// lower left, upper right, lower right) where `columns_last`, else (upper left, upper right, lower left, lower right).
template <bool columns_last>
__device__ __forceinline__ int block_at(int row, int column) {
  const int lane = thread_rank() % 32, near = lane / 8 % 2, far = lane / 16;
  const int down = columns_last ? near : far, right = columns_last ? far : near;
  return panel_at(row + 8 * down + lane % 8, column / 8 + right);
}

// mma's first operand, 16 rows of the product by 16 of depth; `transposed` where the panel's rows are the depth.
template <bool transposed, typename T>
__device__ __forceinline__ void load_rows(unsigned (&a)[4], Shared<T> panel, int row, int depth) {
  ldmatrix_x4<transposed>(a, panel + (transposed ? block_at<false>(depth, row) : block_at<true>(row, depth)));
}

// mma's second operand for two tiles of 8 columns; `transposed` where the panel's rows are the depth.
template <bool transposed, typename T>
__device__ __forceinline__ void load_columns(unsigned (&b)[2][2], Shared<T> panel, int column, int depth) {
  unsigned r[4];
  ldmatrix_x4<transposed>(r, panel + (transposed ? block_at<true>(depth, column) : block_at<false>(column, depth)));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

template <typename T>
__device__ __forceinline__ void unpack_pair(unsigned pair, float (&v)[2]) {
  Pack<T, 2> values;
  memcpy(&values, &pair, sizeof pair);
  unpack(values, v);
}

// relu(bn(x)) of two values, rounded.
template <typename T>
__device__ __forceinline__ unsigned bn_relu_pair(unsigned x, ScaleShift<float> low, ScaleShift<float> high) {
  float v[2];
  unpack_pair<T>(x, v);
  return pack_relu<T>(normalise(v[0], low), normalise(v[1], high));
}

// The sum of a lane's four values of a column.
template <typename T>
__device__ __forceinline__ float sum_of_pairs(const unsigned (&b)[2]) {
  float low[2], high[2];
  unpack_pair<T>(b[0], low);
  unpack_pair<T>(b[1], high);
  return (low[0] + low[1]) + (high[0] + high[1]);
}

// Scale and shift of a channel; those past the last are 0, so that padding stays 0.
__device__ __forceinline__ ScaleShift<float> channel_scale_shift(const BatchNorm<float>& norm, int channel,
                                                                 int channels) {
  if (channel >= channels) return {0, 0};
  return scale_shift(norm.mean[channel], norm.var[channel], norm.weight ? norm.weight[channel] : 1.0f,
                     norm.bias ? norm.bias[channel] : 0.0f, static_cast<float>(norm.eps));
}

}  // namespace ran::cuda::conv1x1
