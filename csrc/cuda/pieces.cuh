// An x in pieces whose channels lie side by side, as a concatenation has them, for the kernels of 16-bit channels_last
// tensors that read them where they are.
#pragma once

#include <climits>

#include "kernels.h"
#include "launch.cuh"

namespace ran::cuda {

// What a launch is given. `first`: the channel that each piece begins at; behind the last, the number of channels.
template <typename T>
struct Pieces {
  const T* data[kMostPieces];
  int first[kMostPieces + 1];
};

// x in one tensor.
struct NoPieces {};

// Where the values of 8 channels lie: of row r at data + r * pitch.
template <typename T>
struct Column {
  const T* data;
  int64_t pitch;
};

// Of the 8 channels from `channel` on. The loop is unrolled, since an argument whose index is known is read in place,
// while others are copied into each thread's memory first.
template <typename T>
__device__ __forceinline__ Column<T> column_of(const Pieces<T>& pieces, int channel) {
  Column<T> found{pieces.data[0], 0};
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i)
    if (channel >= pieces.first[i])
      found = {pieces.data[i] + (channel - pieces.first[i]), pieces.first[i + 1] - pieces.first[i]};
  return found;
}

// Of pieces that reads_pieces() takes.
template <typename T>
Pieces<T> pieces_of(const Rows& x) {
  Pieces<T> pieces;
  int channel = 0;
  for (int i = 0; i <= kMostPieces; ++i) {
    pieces.first[i] = i <= x.count ? channel : INT_MAX;
    if (i == kMostPieces) break;
    pieces.data[i] = static_cast<const T*>(x.pieces[i < x.count ? i : 0].data);
    if (i < x.count) channel += static_cast<int>(x.pieces[i].channels);
  }
  return pieces;
}

}  // namespace ran::cuda
