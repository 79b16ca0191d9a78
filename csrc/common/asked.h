// What the user has asked for, in place of the package's own choice. No torch here.
#pragma once

#include <cstdint>

namespace ran {

// For 3x3 convolutions, in the order of ran_ext.set_conv3x3's names. On the CPU `fused` is as `fast`; on a GPU the
// first two leave the choice to measurements.
enum class Conv3x3Mode : int64_t { fast, strict, library, fused };
// For 1x1 convolutions, and BN-ReLU, on a GPU, in the order of ran_ext.set_conv1x1's and set_bn_relu's names.
enum class Conv1x1Asked : int64_t { automatic, fused, library };
enum class BnReluAsked : int64_t { automatic, resident, streaming };

struct Asked {
  Conv3x3Mode conv3x3 = Conv3x3Mode::fast;
  Conv1x1Asked conv1x1 = Conv1x1Asked::automatic;
  BnReluAsked bn_relu = BnReluAsked::automatic;

  // Of the ops' argument `paths`: a digit in base 4 and two in base 3, the first one lowest, as ran_ext/_paths.py packs
  // them.
  static constexpr int64_t kMost = 4 * 3 * 3 - 1;
  static Asked of(int64_t paths) {
    return {Conv3x3Mode(paths % 4), Conv1x1Asked(paths / 4 % 3), BnReluAsked(paths / 12)};
  }
};

}  // namespace ran
