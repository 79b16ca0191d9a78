// The one-kernel BN-ReLU, by clusters and by cooperative launches, against double; and which shapes fit.
#include "../../csrc/cuda/bn_relu_resident.cu"

#include "bn_relu_reference.h"

using namespace check;
using emu::Buffer;
using ran::cuda::Device;
using ran::cuda::ResidentPlan;

template <typename T>
void name_case(const char* what, const ran::ChannelView& view, const ResidentPlan& plan, int option) {
  begin_case("%s %s %ldx%ld %s of %d, slab %d bytes, option %d", what, Type<T>::name, view.outer, view.channels,
             plan.clusters ? "cluster" : "cooperative group", plan.group, plan.slab_bytes, option);
}

template <typename T>
void check_resident_forward(const ran::ChannelView& view, const ResidentPlan& plan, Inputs inputs) {
  name_case<T>("bn_relu_resident_forward", view, plan, static_cast<int>(inputs));
  Buffer<T> x(view.numel()), out(view.numel());
  fill_activation(x, view, inputs);
  Vectors v(view.channels, inputs != Inputs::far, false);
  Buffer<float> running_mean(view.channels), running_var(view.channels);
  Buffer<int64_t> batches(1);
  Buffer<unsigned> counters(1);
  counters[0] = 0;
  // Cumulative; with a given weight; or none are kept.
  const int kept = static_cast<int>(view.outer % 3);
  const ran::cuda::RunningStatistics runnings[] = {{running_mean.data(), running_var.data(), batches.data(), -1.0f},
                                                   {running_mean.data(), running_var.data(), nullptr, 0.5f},
                                                   {}};
  const double factors[] = {0.25, 0.5, 0};
  Buffer<char> workspace(ran::cuda::bn_relu_resident_workspace_bytes(view, Type<T>::dtype, plan));
  run_schedules(
      [&] {
        for (int64_t c = 0; c < view.channels; ++c) running_mean[c] = 1, running_var[c] = 2;
        batches[0] = 3;
        poison(workspace);
        const ran::BatchNorm<float> norm = v.norm();
        return ran::cuda::bn_relu_resident_forward(out.data(), v.mean.data(), v.var.data(), x.data(), norm.weight,
                                                   norm.bias, Type<T>::dtype, view, v.eps, runnings[kept], plan,
                                                   workspace.data(), counters.data(), nullptr);
      },
      out, v.mean, v.var, running_mean, running_var, batches);
  EXPECT(counters[0] == 0 && batches[0] == (kept == 0 ? 4 : 3));
  check_statistics(view, x, v.mean, v.var, inputs);
  if (inputs != Inputs::constant) check_forward(view, out, x, v, false);
  const double n = view.count(), f = factors[kept];
  for (int64_t c = 0; c < view.channels; ++c) {
    expect_close("running_mean", running_mean, c, 1 - f + f * v.mean[c], 1 + std::fabs(v.mean[c]));
    expect_close("running_var", running_var, c, 2 - 2 * f + f * v.var[c] * n / (n - 1), 2 + v.var[c]);
  }
}

template <typename T>
void check_resident_backward(const ran::ChannelView& view, const ResidentPlan& plan, Inputs inputs,
                             bool with_residual) {
  const bool whole = inputs == Inputs::whole;
  name_case<T>("bn_relu_resident_backward", view, plan, static_cast<int>(inputs) * 2 + with_residual);
  Buffer<T> x(view.numel()), dout(view.numel()), residual(view.numel()), dx(view.numel());
  fill_activation(x, view, inputs);
  fill(dout, -4, 4, whole);
  fill(residual, -4, 4, whole);
  const Vectors v(view.channels, inputs != Inputs::whole, whole);
  Buffer<float> dz(view.channels), dz_xhat(view.channels);
  Buffer<char> workspace(ran::cuda::bn_relu_resident_workspace_bytes(view, Type<T>::dtype, plan));
  run_schedules(
      [&] {
        poison(workspace);
        return ran::cuda::bn_relu_resident_backward(dx.data(), dz.data(), dz_xhat.data(), dout.data(), x.data(),
                                                    with_residual ? residual.data() : nullptr, Type<T>::dtype, view,
                                                    v.norm(), plan, workspace.data(), nullptr);
      },
      dx, dz, dz_xhat);
  const Sums sums = sums_of(view, dout, x, v);
  check_sums(sums, dz, dz_xhat, whole);
  check_dx(view, dx, dout, x, with_residual ? &residual : nullptr, v, &sums);
}

// Whatever a plan is made of, its launch must be taken: memory, co-residency, sizes.
void check_limits() {
  const Device devices[] = {{108, 163 << 10, 1}, {84, 99 << 10, 1},   {132, 227 << 10, 8}, {132, 227 << 10, 16},
                            {16, 99 << 10, 1},   {148, 227 << 10, 8}, {188, 99 << 10, 8}};
  std::vector<int64_t> rows = {1, 2, 31, 1739, 1740, 1741, 3555, 3556, 3557, 7187, 7188, 7189};
  for (int64_t r = 100; r < 200000; r += r / 9) rows.push_back(r), rows.push_back(r * 8), rows.push_back(r * 132);
  int planned = 0;
  for (const Device& device : devices)
    for (const ran::DType dtype : {ran::DType::f32, ran::DType::bf16})
      for (const int64_t channels : {8, 16, 24, 32, 40, 64, 128, 200, 256, 1024, 2048, 65536})
        for (const int64_t outer : rows)
          for (const int tensors : {1, 2}) {
            const ran::ChannelView view{outer, channels, 1};
            const ResidentPlan plan = ran::cuda::bn_relu_resident_plan(view, dtype, device, tensors);
            if (plan.group == 0) continue;
            ++planned;
            begin_case("limits: %ldx%ld, %d tensors, %d SMs of %zu bytes, groups of %d", outer, channels, tensors,
                       device.sm_count, device.shared_bytes, plan.group);
            const ran::LaunchShape shape = ran::cuda::resident_shape(view, dtype, plan, tensors);
            EXPECT(shape.shared_bytes <= device.shared_bytes);
            EXPECT(shape.grid.x == view.channels * ran::cuda::bytes_of(dtype) / plan.slab_bytes * plan.group);
            EXPECT(shape.cooperative == !plan.clusters && shape.grid.x % shape.cluster == 0);
            EXPECT(plan.clusters ? plan.group <= device.max_cluster : shape.grid.x <= unsigned(device.sm_count));
          }
  EXPECT(planned > 1000);
}

// Of batch 128, few channels: most SMs have a block.
void check_that_processors_are_busy() {
  const Device h200{132, 227 << 10, 8};
  const std::pair<int64_t, int64_t> shapes[] = {{32768, 32}, {32768, 64}, {32768, 128}, {8192, 256}, {2048, 1024}};
  for (const auto& [outer, channels] : shapes)
    for (const int tensors : {1, 2}) {
      begin_case("busy SMs: %ldx%ld", outer, channels);
      const ran::ChannelView view{outer, channels, 1};
      const ResidentPlan plan = ran::cuda::bn_relu_resident_plan(view, ran::DType::bf16, h200, tensors);
      EXPECT(ran::cuda::resident_shape(view, ran::DType::bf16, plan, tensors).grid.x >= 120);
    }
}

void check_plans() {
  begin_case("bn_relu_resident_plan");
  const Device h200{132, 227 << 10, 16}, portable{132, 227 << 10, 8}, a100{108, 163 << 10, 1};
  const ran::DType bf16_ = ran::DType::bf16, f32 = ran::DType::f32;
  const auto fits = [](ran::ChannelView view, ran::DType dtype, const Device& device, int tensors) {
    return ran::cuda::bn_relu_resident_fits(view, dtype, device, tensors);
  };
  // Batch 128: every shape of the networks, forward and backward; batch 1024: 8x8 forward, 16x16 not.
  const ran::ChannelView batch128[] = {{32768, 128, 1}, {32768, 64, 1}, {8192, 256, 1}, {2048, 1024, 1}, {2048, 64, 1}};
  for (const auto& view : batch128) {
    const ResidentPlan plan = ran::cuda::bn_relu_resident_plan(view, bf16_, h200, 1);
    EXPECT(plan.group >= 1 && view.channels * 2 % plan.slab_bytes == 0);
    EXPECT(fits(view, bf16_, h200, 2));
    EXPECT(fits(view, bf16_, portable, 1));
    EXPECT(fits(view, bf16_, a100, 1));
  }
  EXPECT(fits({65536, 256, 1}, bf16_, h200, 1));
  EXPECT(!fits({262144, 128, 1}, bf16_, h200, 1));
  EXPECT(!fits({262144, 128, 1}, bf16_, a100, 1));
  EXPECT(!fits({8192, 256, 1}, ran::DType::f64, h200, 1));
  EXPECT(!fits({8192, 256, 4}, bf16_, h200, 1));  // NCHW
  EXPECT(!fits({8192, 12, 1}, bf16_, h200, 1));   // rows that are not whole vectors
  EXPECT(!fits({0, 64, 1}, bf16_, h200, 1));
  EXPECT(fits({512, 4, 1}, f32, h200, 2));
  EXPECT(!fits({512, 100000, 1}, bf16_, a100, 1));  // more slabs than blocks that are resident at once
}

int main() {
  check_plans();
  check_limits();
  check_that_processors_are_busy();
  for_each_type([](auto type) {
    using T = decltype(type);
    const int vector = 16 / sizeof(T);
    for (const bool clusters : {true, false}) {
      if (clusters && std::getenv("RAN_NO_CLUSTERS")) continue;  // of a chip that has none
      const std::tuple<int64_t, int64_t, int, int> shapes[] = {
          // rows, vectors a row, group, slab bytes
          // In the second, several slabs of more columns than a warp has threads, of 16 bits.
          {67, 2, 2, 32}, {90, 24, 1, 128}, {1100, 1, 4, 16}, {5, 2, 8, 32}, {40, 1, 16, 16}, {9, 4, 2, 64}};
      for (const auto& [rows, vectors, group, slab_bytes] : shapes) {
        const ran::ChannelView view{rows, vectors * vector, 1};
        const ResidentPlan plan{group, slab_bytes, clusters};
        check_resident_forward<T>(view, plan, Inputs::random);
        check_resident_backward<T>(view, plan, Inputs::random, group % 4 == 0);
        if (rows != 67) continue;
        for (const Inputs inputs : {Inputs::whole, Inputs::far, Inputs::constant, Inputs::nan})
          check_resident_forward<T>(view, plan, inputs);
        for (const Inputs inputs : {Inputs::whole, Inputs::nan}) check_resident_backward<T>(view, plan, inputs, true);
      }
    }
    // As they are planned for a device, here one of 12 SMs.
    const ran::ChannelView view{300, 64, 1};
    for (const int max_cluster : {1, 8}) {
      if (max_cluster > 1 && std::getenv("RAN_NO_CLUSTERS")) continue;
      const Device device{12, 99 << 10, max_cluster};
      const auto plan = [&](int tensors) {
        return ran::cuda::bn_relu_resident_plan(view, Type<T>::dtype, device, tensors);
      };
      check_resident_forward<T>(view, plan(1), Inputs::random);
      check_resident_backward<T>(view, plan(2), Inputs::random, true);
    }
  });
  begin_case("a tensor off its 16 bytes, a plan that does not fit");
  Buffer<float> x(64, 1), v(64);
  const ran::cuda::RunningStatistics none;
  for (const ResidentPlan& plan : {ResidentPlan{1, 16, false}, ResidentPlan{}})
    EXPECT(ran::cuda::bn_relu_resident_forward(x.data(), v.data(), v.data(), x.data(), nullptr, nullptr,
                                               ran::DType::f32, {8, 8, 1}, 0, none, plan, nullptr, nullptr,
                                               nullptr) == cudaErrorInvalidValue);
  finish("bn_relu_resident");
}
