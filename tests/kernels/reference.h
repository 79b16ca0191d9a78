// Arrays of any dtype with their values in double, and how two of them are compared.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/common/types.h"

namespace kernels {

using ran::DType;

#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using Half = _Float16;
#endif

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[int(dtype)];
}

// Half the distance between neighbouring numbers, relative to them.
inline double roundoff(DType dtype) {
  static const double values[] = {0x1p-24, 0x1p-53, 0x1p-9, 0x1p-12};
  return values[int(dtype)];
}

inline std::mt19937_64& generator() {
  static std::mt19937_64 engine(0);
  return engine;
}
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator());
}
inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator());
}

// Exactly as large as asked for, on the heap, so that a tool that watches memory sees what lies beyond.
class Array {
 public:
  Array(DType dtype, int64_t count)
      : dtype_(dtype), count_(count), data_(std::malloc(size_t(count) * size() + (count == 0))) {
    std::memset(data_, 0xff, size_t(count) * size());  // NaN: what a kernel does not write is seen
  }
  Array(DType dtype, int64_t count, double low, double high) : Array(dtype, count) {
    for (int64_t i = 0; i < count; ++i) set(i, uniform(low, high));
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }

  double operator[](int64_t i) const {
    switch (dtype_) {
      case DType::f32:
        return as<float>()[i];
      case DType::f64:
        return as<double>()[i];
      case DType::bf16: {
        const uint32_t bits = uint32_t(as<uint16_t>()[i]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
      }
      default: {
        Half value;
        std::memcpy(&value, as<uint16_t>() + i, sizeof value);
        return double(float(value));
      }
    }
  }
  void set(int64_t i, double value) const {
    switch (dtype_) {
      case DType::f32:
        as<float>()[i] = float(value);
        return;
      case DType::f64:
        as<double>()[i] = value;
        return;
      case DType::bf16: {
        const float rounded = float(value);
        uint32_t bits;
        std::memcpy(&bits, &rounded, sizeof bits);
        as<uint16_t>()[i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        return;
      }
      default: {
        const Half half = Half(float(value));
        std::memcpy(as<uint16_t>() + i, &half, sizeof half);
      }
    }
  }

 private:
  size_t size() const { return dtype_ == DType::f64 ? 8 : dtype_ == DType::f32 ? 4 : 2; }

  DType dtype_;
  int64_t count_;
  void* data_;
};

using Doubles = std::vector<double>;

inline Doubles values_of(const Array& array) {
  Doubles values(size_t(array.count()));
  for (int64_t i = 0; i < array.count(); ++i) values[i] = array[i];
  return values;
}

struct Judge {
  std::string isa, kernel;
  int64_t compared = 0;

  // The root mean square of the difference, relative to that of what is right, beside what rounding explains.
  void near(const char* what, const Array& got, const Doubles& want, double tolerance) {
    double error = 0, size = 0;
    for (int64_t i = 0; i < got.count(); ++i) error += std::pow(got[i] - want[i], 2), size += want[i] * want[i];
    ++compared;
    if (std::sqrt(error) <= tolerance * std::sqrt(size) + 1e-300) return;  // not so of NaN
    std::printf("%s, %s: %s is off by %.3g of its size, allowed are %.3g\n", isa.c_str(), kernel.c_str(), what,
                std::sqrt(error / (size ? size : 1)), tolerance);
    std::exit(1);
  }
  void equal(const char* what, int64_t got, int64_t want) {
    ++compared;
    if (got == want) return;
    std::printf("%s, %s: %s is %lld, must be %lld\n", isa.c_str(), kernel.c_str(), what, static_cast<long long>(got),
                static_cast<long long>(want));
    std::exit(1);
  }
};

}  // namespace kernels
