// A batch normalisation worked out once for each channel, before a pass over the tensor.
#pragma once

#include <memory>
#include <vector>

#include "../common/formulas.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {

template <typename A>
inline BatchNorm<A> typed(BatchNorm<void> bn) {
  return {static_cast<const A*>(bn.mean), static_cast<const A*>(bn.var), static_cast<const A*>(bn.weight),
          static_cast<const A*>(bn.bias), bn.eps};
}

template <typename A>
struct ScaleShiftTable {
  ScaleShiftTable(BatchNorm<A> bn, int64_t channels) : storage(new A[size_t(2 * channels)]) {
    scale = storage.get();
    shift = scale + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const auto s =
          scale_shift(bn.mean[c], bn.var[c], bn.weight ? bn.weight[c] : A(1), bn.bias ? bn.bias[c] : A(0), A(bn.eps));
      scale[c] = s.scale;
      shift[c] = s.shift;
    }
  }
  std::unique_ptr<A[]> storage;
  A *scale, *shift;
};

// dx = a * dz + b * (x - mean) + c. Without batch statistics (sum_dz null) b and c are 0.
template <typename A>
struct DxTable {
  DxTable(BatchNorm<A> bn, const A* sum_dz, const A* sum_dz_xhat, A count, int64_t channels)
      : mean(bn.mean), storage(new A[size_t(3 * channels)]) {
    a = storage.get();
    b = a + channels;
    c = b + channels;
    for (int64_t i = 0; i < channels; ++i) {
      const auto k = dx_coefficients(bn.mean[i], bn.var[i], bn.weight ? bn.weight[i] : A(1), A(bn.eps),
                                     sum_dz ? sum_dz[i] : A(0), sum_dz_xhat ? sum_dz_xhat[i] : A(0), count);
      a[i] = k.a;
      b[i] = k.b;
      c[i] = k.c;
    }
  }
  const A* mean;
  std::unique_ptr<A[]> storage;
  A *a, *b, *c;
};

// Adds up the tiles' sums of dz and of dz * (x - mean), [tile][2][channel], in order and in double; the second becomes
// the sum of dz * xhat.
template <typename A>
inline void finish_sums(A* sum_dz, A* sum_dz_xhat, const A* partial, int64_t tiles, int64_t channels, BatchNorm<A> bn) {
  std::vector<double> total(size_t(2 * channels), 0.0);
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t i = 0; i < 2 * channels; ++i) total[i] += double(partial[tile * 2 * channels + i]);
  for (int64_t c = 0; c < channels; ++c) {
    sum_dz[c] = A(total[c]);
    sum_dz_xhat[c] = A(total[channels + c] / std::sqrt(double(bn.var[c]) + bn.eps));
  }
}

}  // namespace ran::cpu::RAN_ISA
