// conv3x3_forward and what conv3x3_supported says, against double.
#include "../../csrc/cuda/conv3x3_forward.cu"

#include "../../csrc/cuda/conv3x3_support.cu"
#include "conv3x3_reference.h"

using namespace check;
using emu::Buffer;

struct Options {
  bool bias, residual, statistics;
};
const Options kOptions[] = {{true, true, true}, {true, false, true}, {false, true, true}, {false, false, false}};

template <typename T>
void check_forward(const Conv3x3Inputs<T>& in, int number) {
  const Conv3x3Shape& s = in.s;
  const Options& options = kOptions[number % std::size(kOptions)];
  const int64_t outputs = s.rows() * s.c_out;
  const Filled<T> bias(s.c_out, -2, 2, in.c.whole), residual(outputs, -2, 2, in.c.whole);
  const Buffer<T> y(outputs);
  const StatisticsBuffers out(s.c_out);
  const ConvScratch scratch(ConvPass::forward, s);
  ran::cuda::Conv3x3Forward args{};
  args.y = y.data();
  if (options.statistics) args.statistics = out.cumulative();
  args.x = in.x.data();
  args.norm = in.norm();
  args.weight = in.weight.data();
  if (options.bias) args.bias = bias.data();
  if (options.residual) args.residual = residual.data();
  args.shape = s;
  args.workspace = scratch.workspace.data();
  run_schedules(
      [&] {
        out.reset_running(1);
        return ran::cuda::conv3x3_forward(args, Type<T>::dtype, nullptr);
      },
      y, out.mean, out.var);

  const std::vector<double> a = in.activation(), weight = values(in.weight);
  std::vector<Sum> want(outputs);
  for_each_product(s, [&](int64_t row, int64_t pixel, int64_t tap) {
    for (int64_t k = 0; k < s.c_out; ++k)
      for (int64_t c = 0; c < s.c_in; ++c)
        want[row * s.c_out + k].add(a[pixel * s.c_in + c] * weight[(k * 9 + tap) * s.c_in + c]);
  });
  for (int64_t i = 0; i < outputs; ++i) {
    if (options.bias) want[i].add(value(bias[i % s.c_out]));
    if (options.residual) want[i].add(value(residual[i]));
  }
  expect_sums("y", y, want, in.c.whole);
  EXPECT(out.batches[0] == (options.statistics ? 2 : 1));
  if (options.statistics) out.expect(values(y), 0.5);
}

void expect_refusal(ConvPass pass, const Conv3x3Shape& shape, ran::DType dtype, const char* part) {
  std::string why;
  if (conv3x3_supported(pass, shape, dtype, &why) || why.find(part) == std::string::npos)
    mismatch("refusal is \"%s\", without \"%s\"", why.c_str(), part);
}

void check_refusals() {
  using ran::DType;
  begin_case("conv3x3 refusals");
  ran::cuda::conv1x1::emulated_device = {80, 108, 163 << 10, 164 << 10};
  const auto forward = ConvPass::forward, wgrad = ConvPass::wgrad;
  expect_refusal(forward, {1, 4, 4, 12, 8, 1, 1}, DType::f16,
                 "multiples of 8; got x [1, 12, 4, 4], weight [8, 12, 3, 3], stride 1, padding 1");
  expect_refusal(forward, {1, 4, 4, 8, 8, 3, 1}, DType::f16, "the stride must be 1 or 2");
  expect_refusal(forward, {1, 4, 4, 8, 8, 1, 2}, DType::f16, "the padding must be 0 or 1");
  expect_refusal(forward, {1, 2, 4, 8, 8, 1, 0}, DType::f16, "smaller than the kernel");
  expect_refusal(wgrad, {1, 4, 4, 8, 8, 1, 1}, DType::f32, "bfloat16 or float16");
  expect_refusal(wgrad, {1 << 20, 1 << 6, 1 << 6, 8, 8, 1, 1}, DType::f16, "2^30 pixels");
  expect_refusal(forward, {1, 4, 4, 65536, 8, 1, 1}, DType::bf16, "shared memory");
  expect_refusal(ConvPass::gate, {1, 4, 4, 8, 8, 1, 1}, DType::bf16, "attention gate");
  std::string why = "unset";
  EXPECT(ran::cuda::conv3x3_supported(wgrad, {0, 4, 4, 8, 8, 2, 1}, DType::bf16, &why) && why.empty());
  ran::cuda::conv1x1::emulated_device.capability = 75;
  expect_refusal(forward, {1, 4, 4, 8, 8, 1, 1}, DType::bf16, "compute capability 8.0 or more, it has 7.5");
}

// Whatever the patches, their launch must be taken; and scratch is far smaller than x, of which it holds no copy.
void check_limits() {
  using ran::cuda::conv1x1::DeviceLimits;
  const DeviceLimits devices[] = {{80, 108, 163 << 10, 164 << 10},
                                  {86, 84, 99 << 10, 100 << 10},
                                  {90, 132, 227 << 10, 228 << 10},
                                  {120, 188, 99 << 10, 100 << 10}};
  for (const DeviceLimits& device : devices) {
    ran::cuda::conv1x1::emulated_device = device;
    for (const int64_t n : {1, 128, 1024})
      for (const int64_t side : {3, 4, 7, 8, 16, 17, 32, 56, 224})
        for (const int64_t channels : {8, 64, 136, 256, 1024})
          for (const int stride : {1, 2}) {
            const Conv3x3Shape s{n, side, side, channels, channels, stride, 1};
            begin_case("limits: %ld images of %ld pixels, %ld channels, %d SMs", n, side, channels, device.sm_count);
            EXPECT(conv3x3_supported(ConvPass::forward, s, ran::DType::bf16, nullptr));
            const auto plan = ran::cuda::conv3x3::forward_plan(s);
            EXPECT(plan.shared_bytes <= size_t(device.shared_per_block));
            EXPECT(plan.row_blocks >= 1 && plan.row_blocks <= plan.row_tiles && plan.column_tiles <= 65535);
            for (const auto pass : {ConvPass::forward, ConvPass::dgrad})
              EXPECT(n * side * side < 1 << 15 ||
                     8 * conv3x3_workspace(pass, s) <= size_t(n * side * side * channels * 2));
            // As much as the sums of all blocks that run at once, whatever the number of pixels.
            const size_t tile = 64 * 64 * 3 * sizeof(float), tiles = (channels + 63) / 64 * ((channels + 63) / 64) * 3;
            EXPECT(conv3x3_workspace(ConvPass::wgrad, s) <= (2 * device.sm_count + tiles) * (tile + 256));
          }
  }
  ran::cuda::conv1x1::emulated_device = devices[2];
  begin_case("16x16 pixels on 132 SMs");
  const auto plan = ran::cuda::conv3x3::forward_plan({128, 16, 16, 128, 128, 1, 1});
  EXPECT(plan.tile == ran::cuda::conv1x1::TileKind::large && plan.row_tiles == 256 && plan.patches.halo() == 180);
  EXPECT(2 * (plan.shared_bytes + 1024) <= size_t(devices[2].shared_per_sm));
  begin_case("4x4 pixels on 132 SMs");
  const auto small = ran::cuda::conv3x3::forward_plan({128, 4, 4, 64, 64, 1, 1});
  EXPECT(small.patches.group == 8 && small.row_tiles == 16 && small.row_blocks == 16);
}

int main() {
  for_each_case(kConv3x3Cases, [](const auto& in, int number) { check_forward(in, number); });
  check_limits();
  check_refusals();
  finish("conv3x3_forward");
}
