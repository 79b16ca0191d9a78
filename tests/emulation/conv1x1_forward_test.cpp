// conv1x1_forward and what conv1x1_supported says, against double.
#include "../../csrc/cuda/conv1x1_forward.cu"

#include "../../csrc/cuda/conv1x1_support.cu"
#include "conv1x1_reference.h"

// The other passes' part of the workspace function is not asked for here.
size_t ran::cuda::conv1x1::wgrad_workspace(const Conv1x1Shape&) { return 0; }

using namespace check;
using emu::Buffer;

enum class Statistics { none, of_batch, momentum, cumulative };  // the last two keep running ones as well
struct Options {
  bool bias, residual;
  Statistics statistics;
  int gate_scale;  // 0: no gate
};
const Options kOptions[] = {{true, true, Statistics::cumulative, 0}, {true, false, Statistics::cumulative, 2},
                            {false, true, Statistics::momentum, 1},  {false, false, Statistics::none, 0},
                            {true, false, Statistics::none, 1},      {false, false, Statistics::of_batch, 0},
                            {true, true, Statistics::of_batch, 2}};

template <typename T>
struct Outputs {
  const Conv1x1Shape& s;
  const Options& options;
  int64_t gate_h = options.gate_scale == 2 ? s.out_h() * 2 - 1 : s.out_h();  // the last row is cropped
  int64_t gate_w = options.gate_scale == 2 ? s.out_w() * 2 : s.out_w();
  Buffer<T> y{size_t(s.rows() * s.c_out)}, gated{size_t(options.gate_scale ? s.n * gate_h * gate_w * s.c_out : 0)};
  StatisticsBuffers batch{size_t(s.c_out)};

  ran::cuda::ConvStatistics statistics() const {
    switch (options.statistics) {
      case Statistics::none:
        return {};
      case Statistics::of_batch:
        return {batch.mean.data(), batch.var.data(), {}};
      case Statistics::momentum:
        return {
            batch.mean.data(), batch.var.data(), {batch.running_mean.data(), batch.running_var.data(), nullptr, 0.25f}};
      default:
        return batch.cumulative();
    }
  }
  // The weight of this batch in the running statistics; the cumulative average has seen four before.
  double factor() const {
    return options.statistics == Statistics::cumulative ? 0.2 : options.statistics == Statistics::momentum ? 0.25 : 0;
  }
};

template <typename T>
void check_gate(const Outputs<T>& out, const Buffer<T>& trunk) {
  const int64_t channels = out.s.c_out, scale = out.options.gate_scale;
  for (size_t i = 0; i < out.gated.size(); ++i) {
    const int64_t pixel = i / channels, column = pixel % out.gate_w / scale;
    const int64_t row = pixel / out.gate_w % out.gate_h / scale, image = pixel / (out.gate_w * out.gate_h);
    const double mask =
        value(out.y[((image * out.s.out_h() + row) * out.s.out_w() + column) * channels + i % channels]);
    const double want = (1 + 1 / (1 + std::exp(-mask))) * value(trunk[i]);
    expect_close("gated", out.gated, i, want, want);
  }
}

template <typename T>
void check_statistics(const Outputs<T>& out) {
  out.batch.expect(values(out.options.gate_scale ? out.gated : out.y), out.factor());
  EXPECT(out.batch.batches[0] == (out.options.statistics == Statistics::cumulative ? 5 : 4));
}

template <typename T>
void check_forward(const Conv1x1Inputs<T>& in, int number) {
  const Conv1x1Shape& s = in.s;
  const Options& options = kOptions[number % std::size(kOptions)];
  const Outputs<T> out{s, options};
  const Filled<T> bias(s.c_out, -2, 2, in.c.whole), residual(out.y.size(), -2, 2, in.c.whole);
  const Filled<T> trunk(out.gated.size(), -2, 2, in.c.whole);
  const ConvScratch scratch(ConvPass::forward, s);
  const Given<T> given(in);
  ran::cuda::Conv1x1Gate gate{};
  if (options.gate_scale) gate = {out.gated.data(), trunk.data(), out.gate_h, out.gate_w, options.gate_scale};
  const ran::cuda::Conv1x1Forward args{
      {out.y.data(), out.statistics(), given.x(), in.norm(), in.weight.data(), options.bias ? bias.data() : nullptr,
       options.residual ? residual.data() : nullptr, s, scratch.workspace.data(), scratch.counters.data()},
      gate};
  run_schedules(
      [&] {
        out.batch.reset_running(4);
        return ran::cuda::conv1x1_forward(args, Type<T>::dtype, nullptr);
      },
      out.y, out.gated, out.batch.mean, out.batch.var);

  auto want = multiply({activation_rows(in), s.c_in, 1}, {values(in.weight), 1, s.c_in}, s.rows(), s.c_in, s.c_out);
  for (size_t i = 0; i < want.size(); ++i) {
    if (options.bias) want[i].add(value(bias[i % s.c_out]));
    if (options.residual) want[i].add(value(residual[i]));
  }
  expect_sums("y", out.y, want, in.c.whole);
  if (options.gate_scale) check_gate(out, trunk);
  if (options.statistics != Statistics::none && s.rows() > 1) check_statistics(out);
}

// Values 300 standard deviations from zero: what a naive sum of squares would lose. The weight is the identity.
void check_far_statistics() {
  const Conv1x1Case c{"far from zero", {1, 37, 37, 8, 8, 1}, false, 1, kHopper};
  const Conv1x1Inputs<f16> in(c);
  for (int i = 0; i < 64; ++i) in.weight[i] = make<f16>(i / 8 == i % 8);
  for (size_t i = 0; i < in.x.size(); ++i) in.x[i] = make<f16>(600 + value(in.x[i]) * 3);
  check_forward(in, 0);
}

void expect_refusal(ConvPass pass, const Conv1x1Shape& shape, ran::DType dtype, const char* part) {
  std::string why;
  if (conv1x1_supported(pass, shape, dtype, &why) || why.find(part) == std::string::npos)
    mismatch("refusal is \"%s\", without \"%s\"", why.c_str(), part);
}

void check_refusals() {
  using ran::DType;
  begin_case("conv1x1 refusals");
  const auto forward = ConvPass::forward, dgrad = ConvPass::dgrad, wgrad = ConvPass::wgrad;
  expect_refusal(forward, {1, 4, 4, 12, 8, 1}, DType::f16, "multiples of 8; got x [1, 12, 4, 4], weight [8, 12, 1, 1]");
  expect_refusal(forward, {1, 4, 4, 8, 8, 3}, DType::f16, "the stride must be 1 or 2");
  expect_refusal(forward, {1, 4, 4, 8, 8, 2, true}, DType::f16, "the pieces of a concatenation take stride 1 only");
  expect_refusal(dgrad, {1, 4, 4, 8, 8, 2}, DType::f16, "stride 1 only");
  expect_refusal(wgrad, {1, 4, 4, 8, 8, 1}, DType::f32, "bfloat16 or float16");
  expect_refusal(wgrad, {1 << 20, 1 << 6, 1 << 6, 8, 8, 1}, DType::f16, "2^30 output pixels");
  expect_refusal(forward, {1, 4, 4, 65536, 8, 1}, DType::bf16, "shared memory");
  std::string why = "unset";
  EXPECT(ran::cuda::conv1x1_supported(wgrad, {1, 4, 4, 8, 8, 2}, DType::bf16, &why) && why.empty());
  ran::cuda::conv1x1::emulated_device.capability = 75;
  expect_refusal(forward, {1, 4, 4, 8, 8, 1}, DType::bf16, "compute capability 8.0 or more, it has 7.5");
}

// A launch takes 1 to 64 pieces of whole vectors, on 16 bytes, of a shape that says so, and normalises them.
void check_pieces() {
  begin_case("pieces that are not taken");
  const Conv1x1Case c{"pieces", {1, 2, 3, 16, 8, 1, true}, true, 132, kHopper};
  const Conv1x1Inputs<f16> in(c);
  const Outputs<f16> out{in.s, kOptions[3]};
  const ConvScratch scratch(ConvPass::forward, in.s);
  const auto error = [&](std::vector<ran::Rows::Piece> pieces, const Conv1x1Shape& shape, ran::BatchNorm<float> norm) {
    const ran::Rows x{pieces.data(), static_cast<int64_t>(pieces.size())};
    return ran::cuda::conv1x1_forward({{out.y.data(),
                                        {},
                                        x,
                                        norm,
                                        in.weight.data(),
                                        nullptr,
                                        nullptr,
                                        shape,
                                        scratch.workspace.data(),
                                        scratch.counters.data()}},
                                      ran::DType::f16, nullptr);
  };
  const auto *x = in.x.data(), *second = x + in.s.rows() * 8;
  EXPECT(error({{x, 8}, {second, 8}}, in.s, in.norm()) == cudaSuccess);
  EXPECT(error({}, in.s, in.norm()) == cudaErrorInvalidValue);
  EXPECT(error({{x, 12}, {second, 4}}, in.s, in.norm()) == cudaErrorInvalidValue);
  EXPECT(error({{x, 8}, {second + 4, 8}}, in.s, in.norm()) == cudaErrorInvalidValue);
  EXPECT(error(std::vector<ran::Rows::Piece>(65, {x, 0}), in.s, in.norm()) == cudaErrorInvalidValue);
  EXPECT(error({{x, 8}, {second, 8}}, {1, 2, 3, 16, 8, 1}, in.norm()) == cudaErrorInvalidValue);
  EXPECT(error({{x, 8}, {second, 8}}, in.s, {}) == cudaErrorInvalidValue);
}

// Whatever the plan, its launch must be taken; and a tile that nearly every SM has one of is not given up.
void check_limits() {
  using ran::cuda::conv1x1::DeviceLimits;
  const DeviceLimits devices[] = {{80, 108, 163 << 10, 164 << 10},
                                  {86, 84, 99 << 10, 100 << 10},
                                  {90, 132, 227 << 10, 228 << 10},
                                  {120, 188, 99 << 10, 100 << 10}};
  for (const DeviceLimits& device : devices) {
    ran::cuda::conv1x1::emulated_device = device;
    for (const int64_t rows : {1, 63, 64, 129, 2048, 8192, 16384, 32768, 262144, 1 << 30})
      for (const int64_t c_in : {8, 64, 72, 256, 1024, 4096, 65536})
        for (const int64_t c_out : {8, 64, 128, 136, 1024, 65536})
          for (const auto pass : {ConvPass::forward, ConvPass::dgrad}) {
            const Conv1x1Shape s{1, rows, 1, c_in, c_out, 1};
            begin_case("limits: %ld rows, %ld to %ld, %d SMs", rows, c_in, c_out, device.sm_count);
            if (!conv1x1_supported(pass, s, ran::DType::bf16, nullptr)) continue;
            const auto plan = ran::cuda::plan_of(pass, s);
            EXPECT(plan.shared_bytes <= size_t(device.shared_per_block));
            EXPECT(plan.row_blocks >= 1 && plan.row_blocks <= plan.row_tiles && plan.column_tiles <= 65535);
            EXPECT(plan.splits == 1 ||
                   (plan.row_blocks == plan.row_tiles && plan.splits * plan.tiles() <= device.sm_count &&
                    plan.chunks_a_split >= ran::cuda::conv1x1::kLeastChunks));
          }
  }
  ran::cuda::conv1x1::emulated_device = devices[2];
  begin_case("128 tiles on 132 SMs");
  const auto plan = ran::cuda::plan_of(ConvPass::forward, {128, 8, 16, 256, 128, 1});
  EXPECT(plan.tile == ran::cuda::conv1x1::TileKind::large && plan.row_blocks == 128);
  begin_case("32 tiles on 132 SMs");
  const auto split = ran::cuda::plan_of(ConvPass::forward, {32, 8, 8, 1024, 64, 1});
  EXPECT(split.tiles() == 32 && split.splits == 4 && split.chunks_a_split == 4);
}

int main() {
  for_each_case(kConv1x1Cases, [](const auto& in, int number) { check_forward(in, number); });
  check_far_statistics();
  check_pieces();
  check_limits();
  check_refusals();
  finish("conv1x1_forward");
}
