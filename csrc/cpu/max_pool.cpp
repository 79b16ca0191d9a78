// 2x2 max-pooling at stride 2 with one byte of index a window (torch keeps eight). As in torch, NaN is a maximum.
// Windows do not overlap, so backward writes each position once.
#include <limits>

#include "planes.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {
namespace {

template <typename A>
using Mask = decltype(Vec<A>{} < Vec<A>{});  // whole numbers as wide as A: all bits set, or none
template <typename A, typename Whole>
struct WholeOf {
  typedef Whole type __attribute__((vector_size(VecOf<A>::lanes * sizeof(Whole))));
};
template <typename A, typename Whole>
using Wholes = typename WholeOf<A, Whole>::type;

template <typename A>
inline void store_index(uint8_t* p, Mask<A> index, int n) {
  const auto bytes = __builtin_convertvector(index, Wholes<A, uint8_t>);
  std::memcpy(p, &bytes, size_t(n));
}

template <typename A>
inline Mask<A> load_index(const uint8_t* p, int n) {
  Wholes<A, uint8_t> bytes{};
  std::memcpy(&bytes, p, size_t(n));
  // In two steps: GCC 12 takes the bytes one by one where they are to be four times as wide at once.
  return __builtin_convertvector(__builtin_convertvector(bytes, Wholes<A, uint16_t>), Mask<A>);
}

// The values of one position of `size` windows, position 0 first: where they are larger than the best so far, they are
// the best.
template <typename A, typename T>
inline void keep_larger(A* best, uint8_t* index, const T* values, int position, int64_t size) {
  if (position == 0) {
    convert(best, values, size);
    std::fill_n(index, size, uint8_t(0));
    return;
  }
  for_lanes<A>(size, [&](int64_t i, int n) {
    const Vec<A> value = load(values + i, n), old = load(best + i, n);
    const Mask<A> larger = (value > old) | (value != value);
    store(best + i, larger ? value : old, n);
    store_index<A>(index + i, larger ? Mask<A>{} + position : load_index<A>(index + i, n), n);
  });
}

// The gradients of the values of one position of `size` windows.
template <typename T, typename S, typename A = Acc<T>>
inline void pass_back(S* dx, const T* dout, const uint8_t* index, int position, int64_t size) {
  for_lanes<A>(size, [&](int64_t i, int n) {
    store(dx + i, load_index<A>(index + i, n) == position ? load(dout + i, n) : Vec<A>{}, n);
  });
}

// NCHW goes through `apart`, four arrays, one for each position, with the windows side by side, to be vectors too. What
// a window lacks at the border is -infinity there, which is larger than nothing.
template <typename T, typename A = Acc<T>>
void forward(T* out, uint8_t* index, const T* x, GateShape g) {
  for_row_blocks(g, [&](const RowBlock& block) {
    const int64_t size = block.low_size();
    const T* const high = x + block.high();
    uint8_t* const at = index + block.low();
    std::vector<A> best(static_cast<size_t>(size));
    if (g.channels_last) {
      block.for_pixels([&](int64_t from, int64_t to, int position) {
        keep_larger(best.data() + to, at + to, high + from, position, g.c);
      });
    } else {
      std::vector<A> values(size_t(block.high_size())), apart(size_t(4 * size), -std::numeric_limits<A>::infinity());
      convert(values.data(), high, block.high_size());
      block.for_pixels([&](int64_t from, int64_t to, int position) { apart[position * size + to] = values[from]; });
      for (int k = 0; k < 4; ++k) keep_larger(best.data(), at, apart.data() + k * size, k, size);
    }
    convert(out + block.low(), best.data(), size);
  });
}

template <typename T, typename A = Acc<T>>
void backward(T* dx, const T* dout, const uint8_t* index, GateShape g) {
  for_row_blocks(g, [&](const RowBlock& block) {
    const int64_t size = block.low_size();
    T* const high = dx + block.high();
    const T* const d = dout + block.low();
    const uint8_t* const at = index + block.low();
    if (g.channels_last)
      return block.for_pixels(
          [&](int64_t to, int64_t from, int position) { pass_back(high + to, d + from, at + from, position, g.c); });
    std::vector<A> values(size_t(block.high_size())), apart(size_t(4 * size));
    for (int k = 0; k < 4; ++k) pass_back(apart.data() + k * size, d, at, k, size);
    block.for_pixels([&](int64_t to, int64_t from, int position) { values[to] = apart[position * size + from]; });
    convert(high, values.data(), block.high_size());
  });
}

}  // namespace

void max_pool_forward(void* out, uint8_t* index, const void* x, DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    forward(static_cast<T*>(out), index, static_cast<const T*>(x), g);
  });
}

void max_pool_backward(void* dx, const void* dout, const uint8_t* index, DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    backward(static_cast<T*>(dx), static_cast<const T*>(dout), index, g);
  });
}

}  // namespace ran::cpu::RAN_ISA
