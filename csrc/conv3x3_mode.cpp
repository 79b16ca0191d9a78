#include "conv3x3_mode.h"

#include <atomic>

namespace ran {
namespace {

enum class Mode { fast, strict, library };
std::atomic<Mode> chosen{Mode::fast};

}  // namespace

void set_conv3x3_mode(const std::string& mode) {
  RAN_CHECK_VALUE(mode == "fast" || mode == "strict" || mode == "library", "set_conv3x3",
                  "mode must be fast, strict or library, got ", mode);
  chosen = mode == "fast" ? Mode::fast : mode == "strict" ? Mode::strict : Mode::library;
}

cpu::Conv3x3 choose_conv3x3(ConvPass pass, DType dtype, const cpu::ConvShape& shape) {
  const Mode mode = chosen;
  if (mode == Mode::library || !cpu_kernels().conv3x3_supported(dtype, shape)) return cpu::Conv3x3::library;
  return cpu_kernels().conv3x3_choice(pass, shape, mode == Mode::strict);
}

}  // namespace ran
