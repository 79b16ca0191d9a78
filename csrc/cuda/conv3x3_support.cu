// What the 3x3 convolutions take, and what scratch they need. Host code only.
#include "conv3x3_plan.h"
#include "reduce.cuh"

namespace ran::cuda {
namespace {

using conv3x3::Plan;

constexpr int64_t kMostPixels = int64_t{1} << 30;  // pixels and tiles are counted in int
constexpr int64_t kMostChannels = 1 << 16;         // column tiles are blockIdx.y

std::string text(const Conv3x3Shape& s) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return "x [" + number(s.n) + ", " + number(s.c_in) + ", " + number(s.h) + ", " + number(s.w) + "], weight [" +
         number(s.c_out) + ", " + number(s.c_in) + ", 3, 3], stride " + number(s.stride) + ", padding " +
         number(s.padding);
}

std::vector<Plan> plans_of(ConvPass pass, const Conv3x3Shape& s) {
  return pass == ConvPass::dgrad ? conv3x3::dgrad_plans(s) : std::vector<Plan>{conv3x3::forward_plan(s)};
}

bool fits(ConvPass pass, const Conv3x3Shape& s) {
  if (pass == ConvPass::wgrad) return conv3x3::wgrad_plan(s).patches.group > 0;
  const std::vector<Plan> plans = plans_of(pass, s);
  return std::all_of(plans.begin(), plans.end(), [](const Plan& plan) { return plan.patches.group > 0; });
}

// "" where the shape is taken.
std::string refusal(ConvPass pass, const Conv3x3Shape& s, DType dtype) {
  if (pass == ConvPass::gate) return "no kernel has the attention gate in its epilogue";
  if (dtype != DType::bf16 && dtype != DType::f16) return "the dtype must be bfloat16 or float16";
  if (s.stride != 1 && s.stride != 2) return "the stride must be 1 or 2";
  if (s.padding != 0 && s.padding != 1) return "the padding must be 0 or 1";
  if (s.n < 0 || s.h + 2 * s.padding < 3 || s.w + 2 * s.padding < 3) return "x must not be smaller than the kernel";
  if (s.c_in <= 0 || s.c_out <= 0 || s.c_in % 8 || s.c_out % 8) return "both channel counts must be multiples of 8";
  if (s.c_in > kMostChannels || s.c_out > kMostChannels) return "channel counts must be at most 65536";
  if (s.h > kMostPixels || s.w > kMostPixels || s.n > kMostPixels / s.h / s.w) return "x must have at most 2^30 pixels";
  const conv1x1::DeviceLimits device = conv1x1::device_limits();
  if (device.capability < 80)
    return "the device must have compute capability 8.0 or more, it has " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  if (fits(pass, s)) return "";
  return "so many input channels take more shared memory a block than the device has, " +
         std::to_string(device.shared_per_block) + " bytes";
}

}  // namespace

bool conv3x3_supported(ConvPass pass, const Conv3x3Shape& shape, DType dtype, std::string* why) {
  const std::string reason = refusal(pass, shape, dtype);
  if (why) *why = reason.empty() ? "" : "conv3x3: " + reason + "; got " + text(shape);
  return reason.empty();
}

size_t conv3x3_workspace(ConvPass pass, const Conv3x3Shape& s) {
  if (pass == ConvPass::wgrad) return conv3x3::wgrad_plan(s).splits * conv3x3::wgrad_floats(s) * sizeof(float);
  size_t blocks = 0;
  for (const Plan& plan : plans_of(pass, s)) blocks += plan.row_blocks;
  return blocks * (pass == ConvPass::dgrad ? s.c_in * sizeof(GradientSums) : s.c_out * sizeof(Moments<float>));
}

}  // namespace ran::cuda
