#ifdef RAN_WITH_CUDA

#include "cuda_dispatch.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "environment.h"

namespace ran {
namespace {

std::vector<Measured>& measured() {
  static std::vector<Measured> table;
  return table;
}

// How many times more or fewer rows, as a logarithm.
double distance(const Measured& entry, const cuda::Conv1x1Shape& shape) {
  return std::abs(std::log(double(entry.rows) / double(shape.rows())));
}

const Measured* nearest(ConvPass pass, const cuda::Conv1x1Shape& shape, DType dtype, int arch) {
  const Measured* best = nullptr;
  for (const Measured& entry : measured())
    if (entry.arch == arch && entry.dtype == dtype && entry.pass == pass && entry.c_in == shape.c_in &&
        entry.c_out == shape.c_out && (!best || distance(entry, shape) < distance(*best, shape)))
      best = &entry;
  return best;
}

}  // namespace

void set_measured(std::vector<Measured> table) { measured() = std::move(table); }

ConvWay choose_conv1x1(ConvPass pass, const cuda::Conv1x1Shape& shape, DType dtype, int arch) {
  const std::string choice = environment_choice("RAN_EXT_CONV1X1", {"auto", "fused", "library"});
  if (choice != "auto") return {choice == "fused", "RAN_EXT_CONV1X1=" + choice};
  const Measured* entry = nearest(pass, shape, dtype, arch);
  if (!entry) return {false, "no measurement of these channels on this architecture (RAN_EXT_CONV1X1=fused tries it)"};
  char text[96];
  std::snprintf(text, sizeof text, "measured at %lld pixels: fused %.1f us, library %.1f us",
                static_cast<long long>(entry->rows), entry->fused_us, entry->library_us);
  return {entry->fused_us < entry->library_us, text};
}

}  // namespace ran

#endif
