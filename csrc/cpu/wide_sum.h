// Sums of vectors in double.
#pragma once

#include "vec.h"

namespace ran::cpu::RAN_ISA {

// The sum of vectors, each lane in double: of whole numbers it is exact, and no sum of floats leaves its range.
template <typename A>
struct WideSum {
  static constexpr int parts = int(sizeof(double) / sizeof(A)), lanes = VecOf<double>::lanes;
  Vec<double> part[parts] = {};

  typedef A Part __attribute__((vector_size(kBytes / parts)));
  // Of a vector's sums, as store_to() left them.
  static WideSum at(const double* p) {
    WideSum sum;
    std::memcpy(sum.part, p, sizeof sum.part);
    return sum;
  }
  void operator+=(Vec<A> v) {
    for (int i = 0; i < parts; ++i) {
      Part p;
      std::memcpy(&p, reinterpret_cast<const A*>(&v) + i * lanes, sizeof p);
      part[i] += __builtin_convertvector(p, Vec<double>);
    }
  }
  WideSum operator+(WideSum other) const {
    for (int i = 0; i < parts; ++i) other.part[i] += part[i];
    return other;
  }
  void store_to(double* p, int n) const { std::memcpy(p, part, size_t(n) * sizeof(double)); }
  double total() const {
    double sum = 0;
    for (int i = 0; i < parts; ++i)
      for (int lane = 0; lane < lanes; ++lane) sum += part[i][lane];
    return sum;
  }
  Vec<A> rounded() const {
    Vec<A> v;
    for (int i = 0; i < parts; ++i) {
      const Part p = __builtin_convertvector(part[i], Part);
      std::memcpy(reinterpret_cast<A*>(&v) + i * lanes, &p, sizeof p);
    }
    return v;
  }
};

}  // namespace ran::cpu::RAN_ISA
