// An x in pieces for compare_gpu.cpp.
#pragma once

#include "compare_run.h"

namespace compare {

// The values of x read as two pieces, one behind the other, of which the first has 8 channels.
class TwoPieces {
 public:
  template <typename T>
  TwoPieces(const Array<T>& x, int64_t channels) {
    const int64_t rows = x.size() / channels;
    pieces_[0] = {x.data(), 8};
    pieces_[1] = {x.data() + rows * 8, channels - 8};
  }
  ran::Rows rows() const { return {pieces_, 2}; }

 private:
  ran::Rows::Piece pieces_[2];
};

}  // namespace compare
