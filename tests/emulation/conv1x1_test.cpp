// Runs the 1x1 convolution kernels on the CPU against conv1x1_reference.h, under every schedule of the emulation.
//
//     g++ -std=c++17 -O1 -DRAN_EMULATE -fno-strict-aliasing -Icsrc/cuda -Icsrc -Itests/emulation conv1x1_test.cpp
//     ./a.out [forward|reverse|round_robin|shuffled]...      (none: all)
#include <cstring>
#include <utility>

#include "conv1x1_dgrad_cuda.cu"
#include "conv1x1_forward_cuda.cu"
#include "conv1x1_reference.h"
#include "conv1x1_support_cuda.cu"
#include "conv1x1_wgrad_cuda.cu"

namespace conv1x1_test {
namespace {

struct Case {
  const char* name;
  Conv1x1Shape shape;  // n, h, w, c_in, c_out, stride
  bool normalise;
  int processors;    // few make large tiles and several tiles a block, many make small tiles
  int shared_bytes;  // a block may have; decides whether the weight stays in shared memory
  bool integers = false;
  float shift = 0;  // of the batch normalisation's bias
  int nan_at = -1;  // index in x
};

// The epilogue's options, all but the gate's scale dealt to the cases in turn.
struct Options {
  bool bias, residual, statistics;
  int gate_scale;
};

constexpr int kSmall = 99 << 10, kHopper = 227 << 10;

const Case kCases[] = {
    {"network 32-32", {3, 5, 7, 32, 32, 1}, true, 1, kHopper},
    {"network 32-128", {1, 11, 13, 32, 128, 1}, true, 1, kHopper},
    {"network 128-128", {3, 9, 11, 128, 128, 1}, true, 1, kHopper},
    {"network 128-64", {1, 9, 31, 128, 64, 1}, true, 2, kHopper},
    {"network 64-256", {1, 3, 37, 64, 256, 1}, true, 2, kHopper},
    {"network 128-256 stride 2", {3, 7, 5, 128, 256, 2}, false, 1, kHopper},
    {"network 256-256", {2, 5, 13, 256, 256, 1}, true, 2, kHopper},
    {"network 256-64", {5, 3, 5, 256, 64, 1}, true, 64, kHopper},
    {"network 64-1024", {1, 4, 17, 64, 1024, 1}, true, 132, kHopper},
    {"network 256-1024 stride 2", {5, 6, 7, 256, 1024, 2}, false, 132, kHopper},
    {"network 1024-64", {1, 5, 13, 1024, 64, 1}, true, 132, kHopper},
    {"weight streamed", {1, 17, 17, 256, 128, 1}, true, 1, kSmall},
    {"weight streamed, several tiles", {1, 13, 31, 320, 40, 1}, true, 1, kSmall},
    {"one pixel, least channels", {1, 1, 1, 8, 8, 1}, true, 132, kHopper},
    {"tails everywhere", {3, 7, 7, 72, 136, 1}, true, 1, kSmall},
    {"tails, small tile", {1, 9, 15, 104, 24, 1}, true, 132, kSmall},
    {"stride 2, normalised, odd sizes", {3, 9, 11, 40, 72, 2}, true, 132, kHopper},
    {"large beta", {1, 5, 27, 24, 72, 1}, true, 1, kHopper, false, 100.0f},
    {"integers, large tile", {1, 15, 19, 136, 136, 1}, true, 1, kSmall, true},
    {"integers, tall tile", {3, 7, 13, 72, 64, 1}, true, 1, kHopper, true},
    {"integers, small tile, stride 2", {2, 15, 19, 200, 80, 2}, true, 132, kHopper, true},
    {"integers, plain", {1, 12, 23, 64, 136, 1}, false, 1, kHopper, true},
    {"NaN in x", {1, 6, 23, 40, 136, 1}, true, 1, kHopper, false, 0, 40 * 17 + 21},
    {"NaN in x, plain, stride 2", {1, 6, 23, 40, 72, 2}, false, 132, kHopper, false, 0, 40 * 2 + 5},
};

const Options kOptions[] = {{true, true, true, 0},
                            {true, false, true, 2},
                            {false, true, true, 1},
                            {false, false, false, 0},
                            {true, false, false, 1}};

// What a run leaves, to be compared bit for bit between schedules.
using Bits = std::vector<unsigned char>;
template <typename T>
void keep(Bits& bits, const emu::Buffer<T>& buffer) {
  const auto* p = reinterpret_cast<const unsigned char*>(buffer.data());
  bits.insert(bits.end(), p, p + buffer.bytes());
}

void expect_success(const std::string& what, cudaError_t error) {
  if (error == cudaSuccess) return;
  ++failures;
  std::printf("FAIL %s: the launcher returned error %d\n", what.c_str(), static_cast<int>(error));
}

template <typename T>
struct Run {
  const Case& c;
  const Options& options;
  std::string label;
  const Conv1x1Shape& s = c.shape;
  DType dtype = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
  Generator numbers{std::mt19937(7), c.integers};
  Filled<T> x{s.n * s.h * s.w * s.c_in, numbers};
  Filled<T> weight{s.c_out * s.c_in, numbers, 0.25f};
  Norm norm{static_cast<int>(s.c_in), numbers, c.shift};
  Norm* used_norm = c.normalise ? &norm : nullptr;
  BatchNorm<float> norm_view = c.normalise ? norm.view() : BatchNorm<float>{};
  Bits bits;

  // Plays every pass once; against the reference where `check`.
  void all(bool check) {
    if (c.nan_at >= 0) x[c.nan_at] = from_float<T>(NAN);
    const std::vector<double> a = check ? activation(s, x.data(), used_norm) : std::vector<double>();
    forward(check, a);
    Filled<T> dy{s.rows() * s.c_out, numbers};
    if (s.stride == 1) dgrad(check, dy);
    wgrad(check, dy, a);
  }

  void forward(bool check, const std::vector<double>& a) {
    const int64_t outputs = s.rows() * s.c_out, scale = options.gate_scale;
    const Conv1x1Gate empty{};
    emu::Buffer<T> y(outputs);
    const Filled<T> bias(s.c_out, numbers), residual(outputs, numbers);
    const int64_t gate_h = scale == 2 ? s.out_h() * 2 - 1 : s.out_h(), gate_w = scale == 2 ? s.out_w() * 2 : s.out_w();
    const int64_t gated_count = scale ? s.n * gate_h * gate_w * s.c_out : 0;
    emu::Buffer<T> gated(gated_count);
    const Filled<T> trunk(gated_count, numbers);
    emu::Buffer<float> mean(s.c_out), var(s.c_out), running_mean(s.c_out), running_var(s.c_out);
    emu::Buffer<int64_t> batches(1);
    for (int64_t i = 0; i < s.c_out; ++i) running_mean[i] = 1, running_var[i] = 2;
    batches[0] = 4;
    emu::Buffer<unsigned char> workspace(conv1x1_workspace(Conv1x1Pass::forward, s));
    Conv1x1Statistics statistics;
    if (options.statistics)
      statistics = {mean.data(), var.data(), {running_mean.data(), running_var.data(), batches.data(), -1.0f}};
    const Conv1x1Forward args{
        y.data(),
        scale ? Conv1x1Gate{gated.data(), trunk.data(), gate_h, gate_w, options.gate_scale} : empty,
        statistics,
        x.data(),
        norm_view,
        weight.data(),
        options.bias ? bias.data() : nullptr,
        options.residual ? residual.data() : nullptr,
        s,
        workspace.data()};
    expect_success(label + " forward", conv1x1_forward(args, dtype, nullptr));
    keep(bits, y), keep(bits, gated);
    if (options.statistics) keep(bits, mean), keep(bits, var), keep(bits, running_mean), keep(bits, running_var);
    if (!check) return;

    auto sums = multiply({a, s.c_in, 1}, {to_double(weight), 1, s.c_in}, s.rows(), s.c_in, s.c_out);
    for (int64_t i = 0; i < outputs; ++i) {
      if (options.bias) sums[i].add(to_float(bias[i % s.c_out]));
      if (options.residual) sums[i].add(to_float(residual[i]));
    }
    expect(label + " y", y, sums, c.integers);
    if (scale) check_gate(y, gated, trunk, gate_h, gate_w);
    if (options.statistics)
      check_statistics(to_double(scale ? gated : y), mean, var, running_mean, running_var, batches);
  }

  void check_gate(const emu::Buffer<T>& y, const emu::Buffer<T>& gated, const emu::Buffer<T>& trunk, int64_t gate_h,
                  int64_t gate_w) {
    std::vector<Sum> want(gated.size());
    for (size_t i = 0; i < want.size(); ++i) {
      const int64_t channel = i % s.c_out, pixel = i / s.c_out, column = pixel % gate_w / options.gate_scale;
      const int64_t row = pixel / gate_w % gate_h / options.gate_scale, image = pixel / (gate_w * gate_h);
      const double mask = to_float(y[((image * s.out_h() + row) * s.out_w() + column) * s.c_out + channel]);
      want[i].add((1 + 1 / (1 + std::exp(-mask))) * to_float(trunk[i]));
    }
    expect(label + " gate", gated, want, false);
  }

  void check_statistics(const std::vector<double>& values, const emu::Buffer<float>& mean,
                        const emu::Buffer<float>& var, const emu::Buffer<float>& running_mean,
                        const emu::Buffer<float>& running_var, const emu::Buffer<int64_t>& batches) {
    expect_statistics(label, values, s.c_out, mean, var);
    const double count = static_cast<double>(values.size() / s.c_out), factor = 0.2;  // the fifth batch
    std::vector<Sum> want_mean(s.c_out), want_var(s.c_out);
    for (int64_t i = 0; i < s.c_out; ++i) {
      want_mean[i].add(0.8), want_mean[i].add(factor * mean[i]);
      want_var[i].add(1.6), want_var[i].add(factor * var[i] * count / (count - 1));
    }
    expect(label + " running mean", running_mean, want_mean, false);
    expect(label + " running var", running_var, want_var, false);
    if (batches[0] != 5) ++failures, std::printf("FAIL %s: counted %d batches\n", label.c_str(), int(batches[0] - 4));
  }

  void dgrad(bool check, const emu::Buffer<T>& dy) {
    emu::Buffer<T> dz(s.rows() * s.c_in);
    emu::Buffer<float> sum_dz(s.c_in), sum_dz_xhat(s.c_in);
    emu::Buffer<unsigned char> workspace(conv1x1_workspace(Conv1x1Pass::dgrad, s));
    const Conv1x1Dgrad args{dz.data(),
                            sum_dz.data(),
                            sum_dz_xhat.data(),
                            dy.data(),
                            c.normalise ? x.data() : nullptr,
                            norm_view,
                            weight.data(),
                            s,
                            workspace.data()};
    expect_success(label + " dgrad", conv1x1_dgrad(args, dtype, nullptr));
    keep(bits, dz);
    if (c.normalise) keep(bits, sum_dz), keep(bits, sum_dz_xhat);
    if (!check) return;

    auto want = multiply({to_double(dy), s.c_out, 1}, {to_double(weight), s.c_in, 1}, s.rows(), s.c_out, s.c_in);
    std::vector<Sum> want_sum(s.c_in), want_xhat(s.c_in);
    for (int64_t i = 0; c.normalise && i < static_cast<int64_t>(want.size()); ++i) {
      const int channel = i % s.c_in;
      if (normalise(to_float(x[i]), norm.at(channel)) <= 0) want[i] = {};
      const double invstd = 1 / std::sqrt(norm.var[channel] + norm.eps), stored = to_float(dz[i]);
      want_sum[channel].add(stored);
      want_xhat[channel].add(stored * (to_float(x[i]) - norm.mean[channel]) * invstd);
    }
    expect(label + " dz", dz, want, c.integers);
    if (!c.normalise) return;
    expect(label + " sum dz", sum_dz, want_sum, c.integers);
    expect(label + " sum dz xhat", sum_dz_xhat, want_xhat, c.integers);
  }

  void wgrad(bool check, const emu::Buffer<T>& dy, const std::vector<double>& a) {
    emu::Buffer<T> dweight(s.c_out * s.c_in), dbias(s.c_out);
    emu::Buffer<unsigned char> workspace(conv1x1_workspace(Conv1x1Pass::wgrad, s));
    const Conv1x1Wgrad args{dweight.data(),  options.bias ? dbias.data() : nullptr, dy.data(), x.data(), norm_view, s,
                            workspace.data()};
    expect_success(label + " wgrad", conv1x1_wgrad(args, dtype, nullptr));
    keep(bits, dweight);
    if (options.bias) keep(bits, dbias);
    if (!check) return;

    const std::vector<double> dy_values = to_double(dy), ones(s.rows(), 1.0);
    expect(label + " dweight", dweight, multiply({dy_values, 1, s.c_out}, {a, s.c_in, 1}, s.c_out, s.rows(), s.c_in),
           c.integers);
    if (options.bias)
      expect(label + " dbias", dbias, multiply({dy_values, 1, s.c_out}, {ones, 1, 1}, s.c_out, s.rows(), 1),
             c.integers);
  }
};

template <typename T>
void run_case(const Case& c, const Options& options, const std::vector<emu::Schedule>& schedules) {
  conv1x1::emulated_device = {80, c.processors, c.shared_bytes, c.shared_bytes + 1024};
  const std::string label = std::string(c.name) + (std::is_same_v<T, bf16> ? " bf16" : " f16");
  Bits first;
  for (const emu::Schedule schedule : schedules) {
    emu::schedule = schedule;
    Run<T> run{c, options, label};
    run.all(first.empty());
    if (first.empty()) {
      first = run.bits;
    } else if (run.bits != first) {
      ++failures;
      std::printf("FAIL %s: schedule %d gives other bits\n", label.c_str(), static_cast<int>(schedule));
    }
  }
}

void expect_refusal(Conv1x1Pass pass, const Conv1x1Shape& shape, DType dtype, const char* part) {
  std::string why;
  if (!conv1x1_supported(pass, shape, dtype, &why) && why.find(part) != std::string::npos) return;
  ++failures;
  std::printf("FAIL refusal: wanted \"...%s...\", got \"%s\"\n", part, why.c_str());
}

void run_refusals() {
  using Pass = Conv1x1Pass;
  expect_refusal(Pass::forward, {1, 4, 4, 12, 8, 1}, DType::f16,
                 "multiples of 8; got x [1, 12, 4, 4], weight [8, 12, 1, 1]");
  expect_refusal(Pass::forward, {1, 4, 4, 8, 8, 3}, DType::f16, "the stride must be 1 or 2");
  expect_refusal(Pass::dgrad, {1, 4, 4, 8, 8, 2}, DType::f16, "stride 1 only");
  expect_refusal(Pass::wgrad, {1, 4, 4, 8, 8, 1}, DType::f32, "bfloat16 or float16");
  expect_refusal(Pass::wgrad, {1 << 20, 1 << 6, 1 << 6, 8, 8, 1}, DType::f16, "2^30 output pixels");
  expect_refusal(Pass::forward, {1, 4, 4, 65536, 8, 1}, DType::bf16, "shared memory");
  conv1x1::emulated_device.capability = 75;
  expect_refusal(Pass::forward, {1, 4, 4, 8, 8, 1}, DType::bf16, "compute capability 8.0 or more, it has 7.5");
}

// Without pixels the gradients of the parameters are zero.
void run_empty() {
  const Conv1x1Shape s{0, 4, 4, 8, 16, 1};
  emu::Buffer<bf16> nothing(0), dweight(16 * 8), dbias(16);
  emu::Buffer<float> sum_dz(8), sum_dz_xhat(8);
  Generator numbers{std::mt19937(1), true};
  const Norm norm(8, numbers, 0);
  expect_success("empty wgrad", conv1x1_wgrad({dweight.data(), dbias.data(), nothing.data(), nothing.data(),
                                               norm.view(), s, nothing.data()},
                                              DType::bf16, nullptr));
  expect_success("empty dgrad", conv1x1_dgrad({nothing.data(), sum_dz.data(), sum_dz_xhat.data(), nothing.data(),
                                               nothing.data(), norm.view(), dweight.data(), s, nothing.data()},
                                              DType::bf16, nullptr));
  expect("empty dweight", dweight, std::vector<Sum>(16 * 8), true);
  expect("empty dbias", dbias, std::vector<Sum>(16), true);
  expect("empty sum dz", sum_dz, std::vector<Sum>(8), true);
  expect("empty sum dz xhat", sum_dz_xhat, std::vector<Sum>(8), true);
}

}  // namespace
}  // namespace conv1x1_test

int main(int argc, char** argv) {
  using namespace conv1x1_test;
  const std::pair<const char*, emu::Schedule> names[] = {{"forward", emu::Schedule::forward},
                                                         {"reverse", emu::Schedule::reverse},
                                                         {"round_robin", emu::Schedule::round_robin},
                                                         {"shuffled", emu::Schedule::shuffled}};
  std::vector<emu::Schedule> schedules;
  for (const auto& [name, schedule] : names) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], name) == 0;
    if (wanted) schedules.push_back(schedule);
  }
  size_t index = 0;
  for (const Case& c : kCases) {
    const Options& options = kOptions[index++ % std::size(kOptions)];
    run_case<bf16>(c, options, schedules);
    run_case<f16>(c, options, schedules);
  }
  run_empty();
  run_refusals();
  std::printf("conv1x1: %zu cases in 2 dtypes under %zu schedules, %d failures\n", index, schedules.size(), failures);
  return failures != 0;
}
