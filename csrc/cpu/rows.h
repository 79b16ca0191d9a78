// An activation's rows, which a kernel reads a block at a time; those of pieces are put side by side where the block is
// used, so that they are never written to memory.
#pragma once

#include "kernels.h"

namespace ran::cpu::RAN_ISA {

// `size` values of each of `rows` rows, kUnit bytes at a time: a call of memcpy takes longer than such a move.
template <int kUnit, typename T>
inline void copy_rows(T* to, int64_t to_stride, const T* from, int64_t size, int64_t rows) {
  constexpr int64_t kValues = kUnit / int64_t(sizeof(T));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < size; i += kValues) std::memcpy(to + row * to_stride + i, from + row * size + i, kUnit);
}

template <typename T>
class RowsOf {
 public:
  RowsOf(const Rows& rows, int64_t channels) : rows_(rows), channels_(channels) {}

  // Of one tensor.
  const T* data() const { return static_cast<const T*>(rows_.data); }
  // Values that at() needs room for.
  int64_t room(int64_t count) const { return rows_.pieces ? count * channels_ : 0; }

  // Rows [first, first + count), one after the other: where they are, or, of pieces, in `room`.
  const T* at(int64_t first, int64_t count, T* room) const {
    if (!rows_.pieces) return data() + first * channels_;
    T* to = room;
    for (int64_t piece = 0; piece < rows_.count; ++piece) {
      const int64_t size = rows_.pieces[piece].channels, bytes = size * int64_t(sizeof(T));
      const T* const from = static_cast<const T*>(rows_.pieces[piece].data) + first * size;
      if (bytes % 16 == 0)
        copy_rows<16>(to, channels_, from, size, count);
      else if (bytes % 8 == 0)
        copy_rows<8>(to, channels_, from, size, count);
      else
        copy_rows<sizeof(T)>(to, channels_, from, size, count);
      to += size;
    }
    return room;
  }

 private:
  const Rows rows_;
  const int64_t channels_;
};

}  // namespace ran::cpu::RAN_ISA
