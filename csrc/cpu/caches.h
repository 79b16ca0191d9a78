// The sizes of the caches that the blocks of a computation are to fit, and what asks for a line of them.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace ran::cpu::RAN_ISA {

// Bytes of a core's second-level cache, or what most have where the system does not say.
inline int64_t second_level_cache() {
  static const int64_t bytes = [] {
    long found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? int64_t(found) : int64_t{512} << 10;
  }();
  return bytes;
}

// Assembly, since GCC 12 takes a function that does nothing but __builtin_prefetch for one without effect.
template <bool kWrite>
inline void prefetch_line(const void* p) {
#if defined(__x86_64__)
  if (kWrite)
    asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p)));
  else
    asm volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, kWrite, 2);
#endif
}

// All lines of `count` values from p on.
template <bool kWrite, typename T>
inline void prefetch_values(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) prefetch_line<kWrite>(p + i);
}

}  // namespace ran::cpu::RAN_ISA
