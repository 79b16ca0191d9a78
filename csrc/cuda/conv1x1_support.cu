// What the 1x1 convolutions take, and what scratch they need. Host code only.
#include "conv1x1_plan.h"
#include "reduce.cuh"

namespace ran::cuda {
namespace {

using conv1x1::Plan;

constexpr int64_t kMostRows = int64_t{1} << 30;  // rows and tiles are counted in int
constexpr int64_t kMostChannels = 1 << 16;       // column tiles are blockIdx.y

Plan plan_of(ConvPass pass, const Conv1x1Shape& s) {
  if (pass == ConvPass::dgrad) return conv1x1::make_plan(s.rows(), s.c_out, s.c_in, conv1x1::dgrad_table_bytes());
  return conv1x1::make_plan(s.rows(), s.c_in, s.c_out, conv1x1::forward_table_bytes(s.c_in, s.pieces));
}

std::string text(const Conv1x1Shape& s) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return "x [" + number(s.n) + ", " + number(s.c_in) + ", " + number(s.h) + ", " + number(s.w) + "], weight [" +
         number(s.c_out) + ", " + number(s.c_in) + ", 1, 1], stride " + number(s.stride);
}

// "" where the shape is taken.
std::string refusal(ConvPass pass, const Conv1x1Shape& s, DType dtype) {
  if (dtype != DType::bf16 && dtype != DType::f16) return "the dtype must be bfloat16 or float16";
  if (s.n < 0 || s.h < 0 || s.w < 0) return "sizes must not be negative";
  if (s.c_in <= 0 || s.c_out <= 0 || s.c_in % 8 || s.c_out % 8) return "both channel counts must be multiples of 8";
  if (s.c_in > kMostChannels || s.c_out > kMostChannels) return "channel counts must be at most 65536";
  if (s.pieces && s.stride != 1) return "the pieces of a concatenation take stride 1 only";
  if (s.stride != 1 && s.stride != 2) return "the stride must be 1 or 2";
  if (pass == ConvPass::dgrad && s.stride != 1) return "the input's gradient takes stride 1 only";
  if (s.rows() > kMostRows || s.h > kMostRows || s.w > kMostRows) return "there must be at most 2^30 output pixels";
  const conv1x1::DeviceLimits device = conv1x1::device_limits();
  if (device.capability < 80)
    return "the device must have compute capability 8.0 or more, it has " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  if (pass == ConvPass::wgrad) return "";
  const size_t bytes = plan_of(pass, s).shared_bytes, most = device.shared_per_block;
  if (bytes <= most) return "";
  return "so many input channels take " + std::to_string(bytes) + " bytes of shared memory a block, the device has " +
         std::to_string(most);
}

}  // namespace

bool conv1x1_supported(ConvPass pass, const Conv1x1Shape& shape, DType dtype, std::string* why) {
  const std::string reason = refusal(pass, shape, dtype);
  if (why) *why = reason.empty() ? "" : "conv1x1: " + reason + "; got " + text(shape);
  return reason.empty();
}

size_t conv1x1_workspace(ConvPass pass, const Conv1x1Shape& s) {
  if (pass == ConvPass::wgrad) return conv1x1::wgrad_workspace(s);
  const Plan plan = plan_of(pass, s);
  const size_t blocks = plan.row_blocks;
  return plan.split_bytes() +
         (pass == ConvPass::dgrad ? blocks * s.c_in * sizeof(GradientSums) : blocks * s.c_out * sizeof(Moments<float>));
}

size_t conv1x1_counters(ConvPass pass, const Conv1x1Shape& s) {
  return pass == ConvPass::wgrad ? 0 : plan_of(pass, s).counters();
}

}  // namespace ran::cuda
