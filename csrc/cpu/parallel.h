// Threads for the CPU kernels: ATen's pool, reached without including torch (csrc/parallel.cpp holds the other end).
#pragma once

#include <cstdint>
#include <functional>

namespace ran {

// Splits [begin, end) among the threads; `body(b, e)` runs on each part. Parts hold at least `grain` items.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

int max_threads();

}  // namespace ran
