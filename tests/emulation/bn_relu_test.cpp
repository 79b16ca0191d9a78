// The streaming BN-ReLU kernels, and the sums and additions of the same reductions, against double.
#include "../../csrc/cuda/bn_relu_apply.cu"
#include "../../csrc/cuda/bn_relu_backward.cu"
#include "../../csrc/cuda/bn_relu_statistics.cu"
#include "../../csrc/cuda/channel_sums.cu"
#include "bn_relu_reference.h"

using namespace check;
using emu::Buffer;

struct Scratch {
  Buffer<char> workspace;
  Buffer<unsigned> counters;
  explicit Scratch(const ran::ChannelView& view)
      : workspace(ran::cuda::bn_relu_workspace_bytes(view)), counters(ran::cuda::bn_relu_counters(view)) {
    std::memset(counters.data(), 0, counters.bytes());
  }
  ~Scratch() {
    for (size_t i = 0; i < counters.size(); ++i) EXPECT(counters[i] == 0);
  }
};

template <typename T>
void name_case(const char* what, const ran::ChannelView& view, size_t shift, int option) {
  begin_case("%s %s %ldx%ldx%ld shift %zu option %d", what, Type<T>::name, view.outer, view.channels, view.inner, shift,
             option);
}

template <typename T>
void check_bn_statistics(const ran::ChannelView& view, size_t shift, Inputs inputs) {
  name_case<T>("bn_relu_statistics", view, shift, static_cast<int>(inputs));
  Buffer<T> x(view.numel(), shift);
  Buffer<float> mean(view.channels), var(view.channels), running_mean(view.channels), running_var(view.channels);
  Buffer<int64_t> batches(1);
  Scratch scratch(view);
  fill_activation(x, view, inputs);
  const bool cumulative = inputs == Inputs::random;
  const ran::cuda::RunningStatistics running{running_mean.data(), running_var.data(), batches.data(),
                                             cumulative ? -1.0f : 0.25f};
  run_schedules(
      [&] {
        for (int64_t c = 0; c < view.channels; ++c) running_mean[c] = 1, running_var[c] = 2;
        batches[0] = 3;
        poison(scratch.workspace);
        return ran::cuda::bn_relu_statistics(mean.data(), var.data(), x.data(), Type<T>::dtype, view, running,
                                             scratch.workspace.data(), scratch.counters.data(), nullptr);
      },
      mean, var, running_mean, running_var, batches);
  EXPECT(batches[0] == 4);
  check_statistics(view, x, mean, var, inputs);
  const double n = view.count();
  for (int64_t c = 0; c < view.channels; ++c) {
    const double factor = cumulative ? 1.0 / 4 : 0.25;
    expect_close("running_mean", running_mean, c, 1 - factor + factor * mean[c], 1 + std::fabs(mean[c]));
    if (n > 1)
      expect_close("running_var", running_var, c, 2 * (1 - factor) + factor * var[c] * n / (n - 1), 2 + var[c]);
  }
}

template <typename T>
void check_bn_forward(const ran::ChannelView& view, size_t shift, Inputs inputs) {
  const bool whole = inputs == Inputs::whole;
  name_case<T>("bn_relu_forward", view, shift, static_cast<int>(inputs));
  Buffer<T> x(view.numel(), shift), out(view.numel(), shift);
  fill_activation(x, view, inputs);
  const Vectors v(view.channels, view.channels % 2 == 0, whole);
  run_schedules(
      [&] { return ran::cuda::bn_relu_forward(out.data(), x.data(), Type<T>::dtype, view, v.norm(), nullptr); }, out);
  check_forward(view, out, x, v, whole);
}

template <typename T>
void check_bn_backward(const ran::ChannelView& view, size_t shift, Inputs inputs, bool with_residual) {
  const bool whole = inputs == Inputs::whole;
  name_case<T>("bn_relu_backward", view, shift, static_cast<int>(inputs) * 2 + with_residual);
  Buffer<T> x(view.numel(), shift), dout(view.numel(), shift), residual(view.numel(), shift), dx(view.numel(), shift);
  fill_activation(x, view, inputs);
  fill(dout, -4, 4, whole);
  fill(residual, -4, 4, whole);
  const Vectors v(view.channels, view.channels % 2 == 0, whole);
  Buffer<float> dz(view.channels), dz_xhat(view.channels);
  Scratch scratch(view);
  run_schedules(
      [&] {
        poison(scratch.workspace);
        return ran::cuda::bn_relu_backward_reduce(dz.data(), dz_xhat.data(), dout.data(), x.data(), Type<T>::dtype,
                                                  view, v.norm(), scratch.workspace.data(), scratch.counters.data(),
                                                  nullptr);
      },
      dz, dz_xhat);
  const Sums sums = sums_of(view, dout, x, v);
  check_sums(sums, dz, dz_xhat, whole);
  for (const bool batch_statistics : {true, false}) {
    run_schedules(
        [&] {
          return ran::cuda::bn_relu_backward_apply(
              dx.data(), dout.data(), x.data(), batch_statistics ? dz.data() : nullptr,
              batch_statistics ? dz_xhat.data() : nullptr, with_residual ? residual.data() : nullptr, view.count(),
              Type<T>::dtype, view, v.norm(), nullptr);
        },
        dx);
    check_dx(view, dx, dout, x, with_residual ? &residual : nullptr, v, batch_statistics ? &sums : nullptr);
  }
}

// dx of an x in two pieces, of 16-bit values.
template <typename T>
void check_pieces(Inputs inputs) {
  const ran::ChannelView view{37, 24, 1};
  name_case<T>("bn_relu_backward of pieces", view, 0, static_cast<int>(inputs));
  Buffer<T> x(view.numel()), dout(view.numel()), dx(view.numel()), left(37 * 8), right(37 * 16);
  fill_activation(x, view, inputs);
  fill(dout, -4, 4, false);
  for (int64_t i = 0; i < view.numel(); ++i)
    (i % 24 < 8 ? left[i / 24 * 8 + i % 24] : right[i / 24 * 16 + i % 24 - 8]) = x[i];
  const ran::Rows::Piece pieces[] = {{left.data(), 8}, {right.data(), 16}};
  const Vectors v(view.channels, true, false);
  const Sums sums = sums_of(view, dout, x, v);
  Buffer<float> dz(view.channels), dz_xhat(view.channels);
  for (int64_t c = 0; c < view.channels; ++c) dz[c] = sums.dz[c], dz_xhat[c] = sums.dz_xhat[c];
  const auto apply = [&](ran::Rows rows, const void* residual) {
    return ran::cuda::bn_relu_backward_apply(dx.data(), dout.data(), rows, dz.data(), dz_xhat.data(), residual,
                                             view.count(), Type<T>::dtype, view, v.norm(), nullptr);
  };
  if (sizeof(T) != 2) {
    EXPECT(apply({pieces, 2}, nullptr) == cudaErrorInvalidValue);
    return;
  }
  run_schedules([&] { return apply({pieces, 2}, nullptr); }, dx);
  check_dx<T>(view, dx, dout, x, nullptr, v, &sums);
  EXPECT(apply({pieces, 2}, x.data()) == cudaErrorInvalidValue);
}

template <typename T>
void check_channel_sums(const ran::ChannelView& view, size_t shift, Inputs inputs) {
  name_case<T>("channel_sums", view, shift, static_cast<int>(inputs));
  Buffer<T> x(view.numel(), shift), sums(view.channels, shift);
  fill_activation(x, view, inputs);
  Scratch scratch(view);
  run_schedules(
      [&] {
        poison(scratch.workspace);
        return ran::cuda::channel_sums(sums.data(), x.data(), Type<T>::dtype, view, scratch.workspace.data(),
                                       scratch.counters.data(), nullptr);
      },
      sums);
  std::vector<double> want(view.channels), size(view.channels);
  for_each_value(view, [&](int64_t i, int64_t c) {
    want[c] += value(x[i]);
    size[c] += std::fabs(value(x[i]));
  });
  for (int64_t c = 0; c < view.channels; ++c) expect_close("sums", sums, c, want[c], size[c]);
}

template <typename T>
void check_add_with_statistics(const ran::ChannelView& view, Inputs inputs, bool with_bias, bool with_residual) {
  name_case<T>("add_with_statistics", view, 0, static_cast<int>(inputs) * 4 + with_bias * 2 + with_residual);
  Buffer<T> x(view.numel()), bias(view.channels), residual(view.numel()), sum(view.numel());
  fill_activation(x, view, inputs);
  fill(bias, -4, 4, inputs == Inputs::whole);
  fill(residual, -4, 4, inputs == Inputs::whole);
  Buffer<float> mean(view.channels), var(view.channels), running_mean(view.channels), running_var(view.channels);
  Buffer<int64_t> batches(1);
  Scratch scratch(view);
  const T *b = with_bias ? bias.data() : nullptr, *r = with_residual ? residual.data() : nullptr;
  EXPECT(ran::cuda::add_with_statistics_takes(x.data(), b, r, Type<T>::dtype, view));
  run_schedules(
      [&] {
        for (int64_t c = 0; c < view.channels; ++c) running_mean[c] = 1, running_var[c] = 2;
        batches[0] = 3;
        poison(scratch.workspace);
        return ran::cuda::add_with_statistics(sum.data(), mean.data(), var.data(), x.data(), b, r, Type<T>::dtype, view,
                                              {running_mean.data(), running_var.data(), batches.data(), 0.25f},
                                              scratch.workspace.data(), scratch.counters.data(), nullptr);
      },
      sum, mean, var, running_mean, running_var, batches);
  EXPECT(batches[0] == 4);
  for_each_value(view, [&](int64_t i, int64_t c) {
    const double more_b = with_bias ? value(bias[c]) : 0, more_r = with_residual ? value(residual[i]) : 0;
    expect_close("sum", sum, i, value(x[i]) + more_b + more_r,
                 std::fabs(value(x[i])) + std::fabs(more_b) + std::fabs(more_r));
  });
  if (inputs != Inputs::constant) check_statistics(view, sum, mean, var, inputs);
}

int main() {
  for_each_type([](auto type) {
    using T = decltype(type);
    const ran::ChannelView views[] = {{37, 24, 1},  {700, 8, 1}, {70, 264, 1}, {9, 5, 1},    {2, 1, 1},
                                      {3000, 3, 1}, {3, 5, 16},  {2, 3, 49},   {5, 2, 4096}, {1, 4, 10}};
    for (const auto& view : views) {
      for (const Inputs inputs : kAllInputs) check_bn_statistics<T>(view, 0, inputs);
      for (const Inputs inputs : {Inputs::random, Inputs::whole, Inputs::nan}) {
        check_bn_forward<T>(view, 0, inputs);
        check_bn_backward<T>(view, 0, inputs, inputs == Inputs::random);
        if (view.inner == 1) check_channel_sums<T>(view, 0, inputs);
      }
    }
    for (const ran::ChannelView& view : {ran::ChannelView{37, 24, 1}, ran::ChannelView{700, 8, 1}})
      for (const Inputs inputs : kAllInputs)
        for (const int with : {1, 2, 3}) check_add_with_statistics<T>(view, inputs, with & 1, with & 2);
    EXPECT(!ran::cuda::add_with_statistics_takes(nullptr, nullptr, nullptr, Type<T>::dtype, {9, 5, 1}));
    for (const ran::ChannelView& view : {ran::ChannelView{65, 16, 1}, ran::ChannelView{2, 3, 16}}) {
      check_bn_statistics<T>(view, 1, Inputs::random);
      if (view.inner == 1) check_channel_sums<T>(view, 1, Inputs::random);
      check_bn_forward<T>(view, 1, Inputs::random);
      check_bn_backward<T>(view, 1, Inputs::whole, true);
    }
    check_bn_forward<T>({0, 8, 1}, 0, Inputs::random);
    for (const Inputs inputs : {Inputs::random, Inputs::nan}) check_pieces<T>(inputs);
  });
  finish("bn_relu");
}
