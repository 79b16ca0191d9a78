#ifdef RAN_WITH_CUDA

#include "cuda_dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <stdexcept>

#include "environment.h"

namespace ran {
namespace {

// Names in the table; those of convolutions in the order of ConvPass.
constexpr const char* kPasses[] = {"forward", "dgrad", "wgrad", "gate", "bn_relu", "bn_relu_backward"};

std::vector<Measured>& measured() {
  static std::vector<Measured> table;
  return table;
}

// What a choice is made for: a measurement without its times.
using Asked = Measured;

// How many times more or fewer rows, as a logarithm.
double distance(const Measured& entry, const Asked& asked) {
  return std::abs(std::log(double(entry.rows) / double(asked.rows)));
}

const Measured* nearest(const Asked& asked) {
  const Measured* best = nullptr;
  for (const Measured& entry : measured())
    if (entry.arch == asked.arch && entry.dtype == asked.dtype && entry.pass == asked.pass &&
        entry.c_in == asked.c_in && entry.c_out == asked.c_out &&
        (!best || distance(entry, asked) < distance(*best, asked)))
      best = &entry;
  return best;
}

ConvWay faster(const Measured& entry, const char* fused, const char* other) {
  char text[112];
  std::snprintf(text, sizeof text, "measured at %lld pixels: %s %.1f us, %s %.1f us",
                static_cast<long long>(entry.rows), fused, entry.fused_us, other, entry.library_us);
  return {entry.fused_us < entry.library_us, text};
}

}  // namespace

void set_measured(std::vector<Measured> table) {
  for (const Measured& entry : table)
    if (std::find(std::begin(kPasses), std::end(kPasses), entry.pass) == std::end(kPasses))
      throw std::invalid_argument(
          "dispatch.json: pass must be forward, dgrad, wgrad, gate, bn_relu or bn_relu_backward, got " + entry.pass +
          "; measure it again: python -m benchmarks.dispatch --out FILE --install");
  measured() = std::move(table);
}

ConvWay choose_conv1x1(ConvPass pass, const cuda::Conv1x1Shape& shape, DType dtype, int arch) {
  const std::string choice = environment_choice("RAN_EXT_CONV1X1", {"auto", "fused", "library"});
  if (choice != "auto") return {choice == "fused", "RAN_EXT_CONV1X1=" + choice};
  const Measured* entry =
      nearest({arch, dtype, kPasses[static_cast<int>(pass)], shape.rows(), shape.c_in, shape.c_out, 0, 0});
  if (!entry) return {false, "no measurement of these channels on this architecture (RAN_EXT_CONV1X1=fused tries it)"};
  return faster(*entry, "fused", "library");
}

ConvWay choose_bn_relu(bool backward, const ChannelView& view, DType dtype, int arch) {
  const std::string choice = environment_choice("RAN_EXT_BN_RELU", {"auto", "resident", "streaming"});
  if (choice != "auto") return {choice == "resident", "RAN_EXT_BN_RELU=" + choice};
  const char* pass = backward ? "bn_relu_backward" : "bn_relu";
  const Measured* entry = nearest({arch, dtype, pass, view.count(), view.channels, view.channels, 0, 0});
  return entry ? faster(*entry, "resident", "streaming") : ConvWay{true, "held in shared memory"};
}

}  // namespace ran

#endif
