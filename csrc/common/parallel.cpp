#include "../cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace ran {

// Each thread starts on an even part of its own, so that it meets the data that it met in the last pass, and takes it
// piece by piece; one that is done helps the others. Cores are seldom alike: other programs run, or some are slow ones.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kPieces = 8;  // of a part
  const int64_t count = end - begin, threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t parts = std::min(threads, (count + grain - 1) / grain);
  if (parts <= 1) {
    if (count > 0) body(begin, end);
    return;
  }
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Part> left(static_cast<size_t>(parts));
  for (int64_t part = 0; part < parts; ++part) {
    left[part].next = begin + count * part / parts;
    left[part].end = begin + count * (part + 1) / parts;
  }
  const int64_t piece = std::max(grain, count / (parts * kPieces));
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < parts * (last - first); ++i) {
      Part& part = left[(first + i) % parts];
      for (int64_t from; (from = part.next.fetch_add(piece)) < part.end;) body(from, std::min(from + piece, part.end));
    }
  });
}

int max_threads() { return at::get_num_threads(); }

}  // namespace ran
