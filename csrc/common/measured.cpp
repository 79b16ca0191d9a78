#include "measured.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <stdexcept>

#include "environment.h"

namespace ran {
namespace {

constexpr const char* kPasses[] = {"forward", "dgrad", "wgrad", "gate", "bn_relu", "bn_relu_backward"};

std::vector<Measured>& measured() {
  static std::vector<Measured> table;
  return table;
}

// How many times more or fewer rows, as a logarithm.
double distance(const Measured& entry, const Measured& pass) {
  return std::abs(std::log(double(entry.rows) / double(pass.rows)));
}

const Measured* nearest(const Measured& pass) {
  const Measured* best = nullptr;
  for (const Measured& entry : measured())
    if (entry.arch == pass.arch && entry.dtype == pass.dtype && entry.pass == pass.pass && entry.c_in == pass.c_in &&
        entry.c_out == pass.c_out && (!best || distance(entry, pass) < distance(*best, pass)))
      best = &entry;
  return best;
}

std::string asked_for(const TwoPaths& paths) {
  return environment_choice(paths.variable, {"auto", paths.fused, paths.other});
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

Decision decide(const Measured& pass, const TwoPaths& paths) {
  const std::string asked = asked_for(paths);
  if (asked != "auto") return asked == paths.fused ? Decision::fused_asked : Decision::other_asked;
  const Measured* entry = nearest(pass);
  if (!entry) return Decision::unmeasured;
  return entry->fused_us < entry->library_us ? Decision::fused_faster : Decision::other_faster;
}

std::string describe(const Measured& pass, const TwoPaths& paths) {
  const std::string asked = asked_for(paths);
  if (asked != "auto") return std::string(paths.variable) + "=" + asked;
  const Measured* entry = nearest(pass);
  if (!entry) return "";
  char text[112];
  std::snprintf(text, sizeof text, "measured at %lld pixels: %s %.1f us, %s %.1f us",
                static_cast<long long>(entry->rows), paths.fused, entry->fused_us, paths.other, entry->library_us);
  return text;
}

}  // namespace ran
