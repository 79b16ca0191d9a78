// The passes of batch normalisation and what follows it, over dense NCHW and channels_last tensors, shared by every
// activation: Act has
//   Vec<A> value(Vec<A> z)                    the activation of the normalised values
//   Vec<A> gradient(Vec<A> dout, Vec<A> z)    dz, which is 0 where dout is
//   kKeeps                                    whether dz takes so long that the pass of the sums may write it for the
//   last
#pragma once

#include <algorithm>
#include <vector>

#include "../common/formulas.h"
#include "moments.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "tables.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {

constexpr int64_t kTileRows = 128;    // rows of a channels_last tile
constexpr int64_t kTileLanes = 4;     // vectors of channels that a tile's inner loop holds in registers
constexpr int64_t kPlaneTile = 4096;  // values of an NCHW tile: within one image's plane
constexpr int64_t kGrain = 32768;     // values that are worth a thread

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// ---- channels_last: [rows][channels]; a task is one tile of rows, one block of channels ----

template <typename A>
constexpr int64_t channel_block() {
  return kTileLanes * VecOf<A>::lanes;
}

// Runs body(tile, first row, rows, first channel, channels) for every tile and block of channels.
template <typename A, typename Body>
void for_row_tiles(ChannelView v, Body&& body) {
  const int64_t blocks = tiles_of(v.channels, channel_block<A>());
  const int64_t tasks = tiles_of(v.outer, kTileRows) * blocks;
  parallel_for(0, tasks, std::max<int64_t>(1, kGrain / (kTileRows * channel_block<A>())),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t tile = task / blocks, c = task % blocks * channel_block<A>();
                   const int64_t row = tile * kTileRows;
                   body(tile, row, std::min(kTileRows, v.outer - row), c, std::min(channel_block<A>(), v.channels - c));
                 }
               });
}

template <typename Act, typename T, typename A = Acc<T>>
void forward_rows(Act act, T* out, const T* x, ChannelView v, const ScaleShiftTable<A>& table) {
  parallel_for(
      0, v.outer, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, v.channels)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for_lanes<A>(v.channels, [&](int64_t i, int n) {
            const Vec<A> z = fma(load(x + row * v.channels + i, n), load(table.scale + i, n), load(table.shift + i, n));
            store(out + row * v.channels + i, act.value(z), n);
          });
      });
}

template <typename Act, typename T, typename A = Acc<T>>
void reduce_rows(Act act, T* kept, A* sum_dz, A* sum_dz_xhat, const T* dout, const T* x, ChannelView v, BatchNorm<A> bn,
                 const ScaleShiftTable<A>& table) {
  const int64_t tiles = tiles_of(v.outer, kTileRows);
  std::vector<A> partial(size_t(tiles * v.channels * 2));
  for_row_tiles<A>(v, [&](int64_t tile, int64_t row, int64_t rows, int64_t c, int64_t channels) {
    for_lanes<A>(channels, [&](int64_t i, int n) {
      const Vec<A> scale = load(table.scale + c + i, n), shift = load(table.shift + c + i, n);
      const Vec<A> mean = load(bn.mean + c + i, n);
      const auto sums = sum_in_runs<Pair<Vec<A>>>(rows, [&](Pair<Vec<A>>& s, int64_t r) {
        const int64_t at = (row + r) * v.channels + c + i;
        const Vec<A> value = load(x + at, n);
        const Vec<A> dz = act.gradient(load(dout + at, n), fma(value, scale, shift));
        if constexpr (Act::kKeeps)
          if (kept) store(kept + at, dz, n);
        s.first += dz;
        s.second = fma(dz, value - mean, s.second);
      });
      A* const to = partial.data() + tile * 2 * v.channels + c + i;
      store(to, sums.first, n);
      store(to + v.channels, sums.second, n);
    });
  });
  finish_sums(sum_dz, sum_dz_xhat, partial.data(), tiles, v.channels, bn);
}

template <bool kBatchStats, typename Act, typename T, typename A = Acc<T>>
void apply_rows(Act act, T* dx, const T* dout, const RowsOf<T>& x, const T* residual, ChannelView v,
                const ScaleShiftTable<A>& table, const DxTable<A>& k) {
  constexpr int64_t kBlock = 32;  // rows
  parallel_for(0, v.outer, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, v.channels)),
               [&](int64_t begin, int64_t end) {
                 const Scratch<T> room(x.room(kBlock));
                 for (int64_t first = begin; first < end; first += kBlock) {
                   const int64_t rows = std::min(kBlock, end - first);
                   const T* const from = x.at(first, rows, room.get());
                   for (int64_t row = 0; row < rows; ++row)
                     for_lanes<A>(v.channels, [&](int64_t i, int n) {
                       const int64_t at = (first + row) * v.channels + i;
                       const Vec<A> value = load(from + row * v.channels + i, n);
                       const Vec<A> z = fma(value, load(table.scale + i, n), load(table.shift + i, n));
                       const Vec<A> dz = act.gradient(load(dout + at, n), z);
                       Vec<A> rest{};
                       if constexpr (kBatchStats)
                         rest = fma(load(k.b + i, n), value - load(k.mean + i, n), load(k.c + i, n));
                       if (residual) rest += load(residual + at, n);
                       store(dx + at, fma(load(k.a + i, n), dz, rest), n);
                     });
                 }
               });
}

// ---- NCHW: [outer][channels][inner]; a task is one plane ----

template <typename Body>
void for_planes(ChannelView v, Body&& body) {
  parallel_for(0, v.outer * v.channels, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, v.inner)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t plane = begin; plane < end; ++plane) body(plane, plane % v.channels, plane * v.inner);
               });
}

template <typename Act, typename T, typename A = Acc<T>>
void forward_planes(Act act, T* out, const T* x, ChannelView v, const ScaleShiftTable<A>& table) {
  for_planes(v, [&](int64_t, int64_t c, int64_t at) {
    const Vec<A> scale = splat(table.scale[c]), shift = splat(table.shift[c]);
    for_lanes<A>(v.inner,
                 [&](int64_t i, int n) { store(out + at + i, act.value(fma(load(x + at + i, n), scale, shift)), n); });
  });
}

template <typename Act, typename T, typename A = Acc<T>>
void reduce_planes(Act act, T* kept, A* sum_dz, A* sum_dz_xhat, const T* dout, const T* x, ChannelView v,
                   BatchNorm<A> bn, const ScaleShiftTable<A>& table) {
  std::vector<double> partial(size_t(v.outer * v.channels * 2), 0.0);
  for_planes(v, [&](int64_t plane, int64_t c, int64_t at) {
    const Vec<A> scale = splat(table.scale[c]), shift = splat(table.shift[c]);
    for (int64_t start = 0; start < v.inner; start += kPlaneTile) {
      const int64_t size = std::min(kPlaneTile, v.inner - start), whole = size / VecOf<A>::lanes;
      const auto add = [&](Pair<Vec<A>>& s, int64_t i, int n) {
        const int64_t from = at + start + i * VecOf<A>::lanes;
        const Vec<A> value = load(x + from, n);
        const Vec<A> dz = act.gradient(load(dout + from, n), fma(value, scale, shift));  // 0 past the end
        if constexpr (Act::kKeeps)
          if (kept) store(kept + from, dz, n);
        s.first += dz;
        s.second = fma(dz, first(value - bn.mean[c], n), s.second);
      };
      auto sums = sum_in_runs<Pair<Vec<A>>>(whole, [&](Pair<Vec<A>>& s, int64_t i) { add(s, i, VecOf<A>::lanes); });
      add(sums, whole, int(size % VecOf<A>::lanes));
      partial[plane * 2] += sum<A>(sums.first);
      partial[plane * 2 + 1] += sum<A>(sums.second);
    }
  });
  for (int64_t c = 0; c < v.channels; ++c) {
    double dz = 0, dz_xhat = 0;
    for (int64_t n = 0; n < v.outer; ++n) {
      dz += partial[(n * v.channels + c) * 2];
      dz_xhat += partial[(n * v.channels + c) * 2 + 1];
    }
    sum_dz[c] = A(dz);
    sum_dz_xhat[c] = A(dz_xhat / std::sqrt(double(bn.var[c]) + bn.eps));
  }
}

template <bool kBatchStats, typename Act, typename T, typename A = Acc<T>>
void apply_planes(Act act, T* dx, const T* dout, const T* x, const T* residual, ChannelView v,
                  const ScaleShiftTable<A>& table, const DxTable<A>& k) {
  for_planes(v, [&](int64_t, int64_t c, int64_t at) {
    const Vec<A> scale = splat(table.scale[c]), shift = splat(table.shift[c]);
    const Vec<A> a = splat(k.a[c]), b = splat(k.b[c]), constant = splat(k.c[c]);
    for_lanes<A>(v.inner, [&](int64_t i, int n) {
      const Vec<A> value = load(x + at + i, n);
      const Vec<A> dz = act.gradient(load(dout + at + i, n), fma(value, scale, shift));
      Vec<A> rest{};
      if constexpr (kBatchStats) rest = fma(b, value - k.mean[c], constant);
      if (residual) rest += load(residual + at + i, n);
      store(dx + at + i, fma(a, dz, rest), n);
    });
  });
}

// ---- of any dtype and layout; make(null pointer of the dtype's C++ type) is the activation ----

template <typename Make>
void bn_forward(Make&& make, void* out, const void* x, DType dtype, ChannelView v, BatchNorm<void> bn) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using Act = decltype(make(t));
    const ScaleShiftTable<Acc<T>> table(typed<Acc<T>>(bn), v.channels);
    const auto run = v.inner == 1 ? &forward_rows<Act, T> : &forward_planes<Act, T>;
    run(make(t), static_cast<T*>(out), static_cast<const T*>(x), v, table);
  });
}

// kept: dz, where the activation keeps it, or null.
template <typename Make>
void bn_backward_reduce(Make&& make, void* kept, void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x,
                        DType dtype, ChannelView v, BatchNorm<void> bn) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    using Act = decltype(make(t));
    const ScaleShiftTable<A> table(typed<A>(bn), v.channels);
    const auto run = v.inner == 1 ? &reduce_rows<Act, T> : &reduce_planes<Act, T>;
    run(make(t), static_cast<T*>(kept), static_cast<A*>(sum_dz), static_cast<A*>(sum_dz_xhat),
        static_cast<const T*>(dout), static_cast<const T*>(x), v, typed<A>(bn), table);
  });
}

template <typename Make>
void bn_backward_apply(Make&& make, void* dx, const void* dout, const Rows& x, const void* residual, const void* sum_dz,
                       const void* sum_dz_xhat, double count, DType dtype, ChannelView v, BatchNorm<void> bn) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    using Act = decltype(make(t));
    const ScaleShiftTable<A> table(typed<A>(bn), v.channels);
    const DxTable<A> k(typed<A>(bn), static_cast<const A*>(sum_dz), static_cast<const A*>(sum_dz_xhat), A(count),
                       v.channels);
    const auto rows = sum_dz ? &apply_rows<true, Act, T> : &apply_rows<false, Act, T>;
    const auto planes = sum_dz ? &apply_planes<true, Act, T> : &apply_planes<false, Act, T>;
    T* const to = static_cast<T*>(dx);
    const T *const from = static_cast<const T*>(dout), *const added = static_cast<const T*>(residual);
    const RowsOf<T> source(x, v.channels);
    v.inner == 1 ? rows(make(t), to, from, source, added, v, table, k)
                 : planes(make(t), to, from, source.data(), added, v, table, k);
  });
}

}  // namespace ran::cpu::RAN_ISA
