// The sizes of the caches that the blocks of a computation are to fit.
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

}  // namespace ran::cpu::RAN_ISA
