// out = lower up-sampled x2 (nearest) and cropped, + skip; backward sums each 2x2 window.
#include "planes.h"
#include "vec.h"

namespace ran::cpu::RAN_ISA {
namespace {

// skip may be null.
template <typename T, typename A = Acc<T>>
inline void add(T* out, const T* lower, const T* skip, int64_t size) {
  for_lanes<A>(size, [&](int64_t i, int n) {
    const Vec<A> value = load(lower + i, n);
    store(out + i, skip ? value + load(skip + i, n) : value, n);
  });
}

template <typename T, typename A = Acc<T>>
inline void accumulate(A* sums, const T* values, int64_t size) {
  for_lanes<A>(size, [&](int64_t i, int n) { store(sums + i, load(sums + i, n) + load(values + i, n), n); });
}

template <typename T>
void forward(T* out, const T* lower, const T* skip, GateShape g) {
  for_row_blocks(g, [&](const RowBlock& block) {
    const T *const low = lower + block.low(), *const add_to = skip ? skip + block.high() : nullptr;
    T* const high = out + block.high();
    if (g.channels_last)
      return block.for_pixels(
          [&](int64_t to, int64_t from, int) { add(high + to, low + from, add_to ? add_to + to : nullptr, g.c); });
    std::vector<T> wide(size_t(block.high_size()));  // stretched first, so that the addition is of vectors
    block.for_pixels([&](int64_t to, int64_t from, int) { wide[to] = low[from]; });
    add(high, wide.data(), add_to, block.high_size());
  });
}

template <typename T, typename A = Acc<T>>
void backward(T* dlower, const T* dout, GateShape g) {
  for_row_blocks(g, [&](const RowBlock& block) {
    const T* const high = dout + block.high();
    std::vector<A> sums(size_t(block.low_size()));
    if (g.channels_last) {
      block.for_pixels([&](int64_t from, int64_t to, int) { accumulate(sums.data() + to, high + from, g.c); });
    } else {
      std::vector<A> values(size_t(block.high_size()));
      convert(values.data(), high, block.high_size());
      block.for_pixels([&](int64_t from, int64_t to, int) { sums[to] += values[from]; });
    }
    convert(dlower + block.low(), sums.data(), block.low_size());
  });
}

}  // namespace

void upsample_add_forward(void* out, const void* lower, const void* skip, DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    forward(static_cast<T*>(out), static_cast<const T*>(lower), static_cast<const T*>(skip), g);
  });
}

void upsample_add_backward(void* dlower, const void* dout, DType dtype, GateShape g) {
  with_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    backward(static_cast<T*>(dlower), static_cast<const T*>(dout), g);
  });
}

}  // namespace ran::cpu::RAN_ISA
