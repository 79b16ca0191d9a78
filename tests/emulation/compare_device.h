// The device that compare_gpu.cpp runs on, emulated or real: memory, limits, and which kernels have run.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/conv1x1_plan.h"

#if !defined(RAN_EMULATE)
#include <cxxabi.h>
#endif

namespace compare {

[[noreturn]] inline void stop(const char* what, const char* why) {
  std::fprintf(stderr, "compare_gpu: %s: %s\n", what, why);
  std::exit(2);
}

inline std::set<std::string> kernels;  // that have run since the case began

#if defined(RAN_EMULATE)

inline void expect(const char* what, cudaError_t error) {
  if (error != cudaSuccess) stop(what, "the launcher refuses it");
  for (const auto& [address, launched] : emu::launches) {
    kernels.insert(launched.name.substr(0, launched.name.find_first_of("< ")));
  }
  emu::launches.clear();
}

// `count` values in the device's memory.
template <typename T>
class Array {
 public:
  explicit Array(size_t count) : buffer_(count) {}
  explicit Array(const std::vector<T>& values) : buffer_(values.size()) {
    std::memcpy(static_cast<void*>(data()), values.data(), buffer_.bytes());
  }
  T* data() const { return buffer_.data(); }
  size_t size() const { return buffer_.size(); }
  std::vector<T> read() const { return {data(), data() + size()}; }

 private:
  emu::Buffer<T> buffer_;
};

#else

inline void expect(const char* what, cudaError_t error) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error != cudaSuccess) stop(what, cudaGetErrorString(error));
}

// Not filled before it is written, so that initcheck sees what a kernel reads too early.
template <typename T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    if (count > 0) expect("cudaMalloc", cudaMalloc(&data_, bytes()));
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    expect("cudaMemcpy", cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* data() const { return data_; }
  size_t size() const { return count_; }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    expect("cudaMemcpy", cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  T* data_ = nullptr;
  size_t count_;
};

// The linker sends every launch here (--wrap=cudaLaunchKernelExC).
extern "C" cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
extern "C" inline __attribute__((used)) cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config,
                                                                               const void* kernel, void** arguments) {
  const char* mangled = nullptr;
  expect("cudaFuncGetName", cudaFuncGetName(&mangled, kernel));
  char* full = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  const std::string name = full ? full : mangled;
  std::free(full);
  const size_t end = name.find("_kernel") + sizeof "_kernel" - 1, start = name.rfind(':', end);
  kernels.insert(name.substr(start + 1, end - start - 1));
  return __real_cudaLaunchKernelExC(config, kernel, arguments);
}

#endif

}  // namespace compare
