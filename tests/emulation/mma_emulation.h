// Twins of the wrappers in csrc/cuda/mma.cuh, by the fragment layouts of the PTX ISA ("Matrix fragments for
// mma.m16n8k16", "ldmatrix").
#pragma once

#include "global_memory.h"
#include "shared_memory.h"

namespace emu {

template <typename T>
const T* gather(const T& value, const char* what, int line, unsigned mask);

inline float widen(unsigned low, __nv_bfloat16) { return bf16_to_float(static_cast<uint16_t>(low)); }
inline float widen(unsigned low, __half) { return f16_to_float(static_cast<uint16_t>(low)); }

struct Fragments {
  unsigned a[4], b[2];
};

// Lands the copies of all but the newest `keep` groups.
inline void land(int keep) {
  auto& copies = self->copies;
  size_t left = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= self->copy_group - keep) {
      copies[left++] = copy;
      continue;
    }
    copy.region->claim(copy.offset, copy.size, copy.size, Granule::defined);
    std::memcpy(copy.region->data() + copy.offset, copy.source, copy.bytes);
    std::memset(copy.region->data() + copy.offset + copy.bytes, 0, copy.size - copy.bytes);
  }
  copies.resize(left);
}

}  // namespace emu

namespace ran {

// The 16x8 sums d += a * b, rounded to float once.
template <typename T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
  const emu::Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emu::Fragments* all = emu::gather(mine, "mma.sync.m16n8k16", line, ~0u);
  const int group = emu::self->lane / 4, pair = emu::self->lane % 4;
  double rows[2][16], columns[2][16];  // of a and of b, those that this lane multiplies
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, shift = k % 2 * 16;
      rows[half][k] = emu::widen(all[group * 4 + holder].a[half + k / 8 * 2] >> shift, T{});
      columns[half][k] = emu::widen(all[(pair * 2 + half) * 4 + holder].b[k / 8] >> shift, T{});
    }
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
    d[i] = static_cast<float>(sum);
  }
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
template <bool transposed, typename T>
void ldmatrix_x4(unsigned (&r)[4], Shared<T> row, int line = __builtin_LINE()) {
  struct Row {
    uint16_t value[8];
  } mine;
  row.region->read(row.offset, &mine, 16, 16);
  const Row* all = emu::gather(mine, "ldmatrix.x4", line, ~0u);
  const int group = emu::self->lane / 4, pair = emu::self->lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const Row* rows = all + matrix * 8;
    const unsigned low = transposed ? rows[pair].value[group] : rows[group].value[pair];
    const unsigned high = transposed ? rows[pair + 1].value[group] : rows[group].value[pair + 1];
    r[matrix] = low | high << 16;
  }
}

template <typename T, typename U>
void cp_async16(Shared<T> to, const U* from, bool valid = true) {
  emu::Region& region = *to.region;
  if (valid) emu::check_global(from, 16, 16);
  region.claim(to.offset, 16, 16, emu::Granule::in_flight);
  emu::self->copies.push_back({&region, to.offset, from, valid ? 16u : 0u, 16, emu::self->copy_group});
}
inline void cp_async_commit() { ++emu::self->copy_group; }
template <int kGroups>
void cp_async_wait() {
  emu::land(kGroups);
}

// Two floats rounded to nearest even and packed, `low` in the low half; negative ones become 0, NaN stays.
template <typename T>
unsigned pack_relu(float low, float high) {
  const auto half = [](float x) -> unsigned {
    const float y = x > 0 || x != x ? x : 0.0f;
    return std::is_same_v<T, __half> ? emu::float_to_f16(y) : emu::float_to_bf16(y);
  };
  return half(low) | half(high) << 16;
}

}  // namespace ran
