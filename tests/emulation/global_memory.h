// Global memory for tests: each buffer ends at a page that cannot be touched, is filled with NaN, and is known by its
// bounds, so that accesses outside it stop the run with the kernel's name and the thread.
#pragma once

#include <csignal>
#include <map>
#include <type_traits>

#include "scheduler.h"

namespace emu {

struct Allocation {
  size_t bytes;
  bool tensor;  // of so many values that it is no vector a channel; neither scratch nor indices, which are of bytes
};
inline std::map<const unsigned char*, Allocation> allocations;  // by their start

inline const std::pair<const unsigned char* const, Allocation>* allocation_of(const void* pointer) {
  const auto after = allocations.upper_bound(static_cast<const unsigned char*>(pointer));
  return after == allocations.begin() ? nullptr : &*std::prev(after);
}

inline void check_global(const void* pointer, size_t bytes, size_t alignment) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail("global memory: misaligned");
  const auto* found = allocation_of(p);
  if (!found) fail("global memory: outside every buffer");
  if (p + bytes > found->first + found->second.bytes) fail("global memory: out of bounds");
}

inline void on_segv(int, siginfo_t*, void*) { fail("global memory: out of bounds (guard page)"); }

inline void install_guard_handler() {
  static const bool once = [] {
    static unsigned char stack[64 << 10];
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  (void)once;
}

// `count` values of T, all bits set (NaN). `shift` moves the start off its 16-byte boundary by so many values.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t shift = 0) : count_(count) {
    install_guard_handler();
    const size_t bytes = count * sizeof(T), offset = shift * sizeof(T);
    const size_t rounded = (offset + bytes + 15) / 16 * 16, pages = (rounded + kPage - 1) / kPage + 1;
    mapped_ = (pages + 1) * kPage;
    base_ =
        static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("no memory for a buffer");
    std::memset(base_, 0xff, pages * kPage);
    mprotect(base_ + pages * kPage, kPage, PROT_NONE);
    data_ = base_ + pages * kPage - rounded + offset;
    allocations[data_] = {bytes, count >= kTensorValues && sizeof(T) > 1};
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    check_slack();
    allocations.erase(data_);
    munmap(base_, mapped_);
  }

  T* data() const { return reinterpret_cast<T*>(data_); }
  T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  static constexpr size_t kPage = 4096, kTensorValues = 4096;

  // The bytes before the buffer and the few behind it still hold what they were filled with.
  void check_slack() const {
    const unsigned char* end = base_ + mapped_ - kPage;
    for (const unsigned char* p = base_; p < end; ++p) {
      if (p == data_) p += bytes();
      if (p < end && *p != 0xff) fail("global memory: bytes just outside a buffer were written");
    }
  }

  size_t count_, mapped_;
  unsigned char *base_, *data_;
};

}  // namespace emu
