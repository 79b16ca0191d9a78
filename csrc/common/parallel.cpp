#include "../cpu/parallel.h"

#include <ATen/Parallel.h>

namespace ran {

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(begin, end, grain, body);
}

int max_threads() { return at::get_num_threads(); }

}  // namespace ran
