#ifdef RAN_WITH_CUDA

#include "cuda_bn_relu.h"

#include <ATen/Functions.h>

#include "cuda_launch.h"
#include "environment.h"

namespace ran {
namespace {

constexpr const char* kOp = "bn_relu";

cuda::Device device_of() {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, kOp);
  return {device_attribute(cudaDevAttrMultiProcessorCount, kOp),
          size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp)), major >= 9 ? 8 : 1};
}

bool is_float_vector(const Tensor& t) { return t.scalar_type() == at::kFloat && t.is_contiguous(); }

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

BatchNorm<float> norm_of(const BatchNormArgs& bn) {
  return {floats(bn.mean), floats(bn.var), floats(bn.weight), floats(bn.bias), bn.kernel.eps};
}

bool on_16_bytes(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

}  // namespace

std::optional<cuda::RunningStatistics> in_launch(const Running& running) {
  if (!running.kept() || !is_float_vector(running.mean) || !is_float_vector(running.var)) return std::nullopt;
  if (running.momentum && !(*running.momentum >= 0)) return std::nullopt;  // the kernels' sign for a cumulative average
  return cuda::RunningStatistics{running.mean.mutable_data_ptr<float>(), running.var.mutable_data_ptr<float>(),
                                 running.batches.defined() ? running.batches.mutable_data_ptr<int64_t>() : nullptr,
                                 float(running.momentum.value_or(-1.0))};
}

bool cuda_batch_norm_stats(Tensor& mean, Tensor& var, const Tensor& x, const Running& running) {
  const c10::DeviceGuard guard(x.device());
  const ChannelView view = view_of(x);
  const Counters counters(cuda::bn_relu_counters(view));
  const Tensor workspace = scratch(cuda::bn_relu_workspace_bytes(view));
  const auto kept = in_launch(running);
  check_launch(
      cuda::bn_relu_statistics(mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>(), x.const_data_ptr(),
                               dtype_of(x, kOp, "x"), view, kept.value_or(cuda::RunningStatistics{}),
                               workspace.mutable_data_ptr(), counters.words(), current_stream()),
      "batch_norm_stats");
  return kept.has_value();
}

cuda::ResidentPlan resident_plan(const Tensor& x, int tensors, std::string* why) {
  const auto refuse = [&](const char* reason) {
    if (why) *why = reason;
    return cuda::ResidentPlan{};
  };
  const std::string choice = environment_choice("RAN_EXT_BN_RELU", {"auto", "resident", "streaming"});
  if (choice == "streaming") return refuse("RAN_EXT_BN_RELU=streaming");
  if (x.numel() == 0 || x.scalar_type() == at::kDouble)
    return refuse("there is no kernel for this dtype or an empty x");
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return refuse("x is not channels_last");
  if (!on_16_bytes(x)) return refuse("x does not begin on a 16-byte boundary");
  const cuda::ResidentPlan plan = cuda::bn_relu_resident_plan(view_of(x), dtype_of(x, kOp, "x"), device_of(), tensors);
  return plan.group ? plan : refuse("x is too large for the blocks' shared memory, or its channels no multiple of 8");
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> cuda_bn_relu_resident(const char* op, const Tensor& x,
                                                                        const OptTensor& weight, const OptTensor& bias,
                                                                        double eps, const Running& running) {
  if (!x.is_cuda()) return std::nullopt;
  const c10::DeviceGuard guard(x.device());
  const cuda::ResidentPlan plan = resident_plan(x, 1);
  if (!plan.group) return std::nullopt;
  const ChannelView view = view_of(x);
  const DType dtype = dtype_of(x, op, "x");
  Tensor out = at::empty_like(x), mean = at::empty({view.channels}, x.options().dtype(at::kFloat));
  Tensor var = at::empty_like(mean);
  const BatchNormArgs bn(op, x, weight, bias, mean, var, eps);
  const Counters counters(cuda::bn_relu_counters(view));
  const Tensor workspace = scratch(cuda::bn_relu_resident_workspace_bytes(view, dtype, plan));
  const auto kept = in_launch(running);
  check_launch(
      cuda::bn_relu_resident_forward(out.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                                     var.mutable_data_ptr<float>(), x.const_data_ptr(), floats(bn.weight),
                                     floats(bn.bias), dtype, view, eps, kept.value_or(cuda::RunningStatistics{}), plan,
                                     workspace.mutable_data_ptr(), counters.words(), current_stream()),
      op);
  if (running.kept() && !kept) running.update(mean, var, view.count());
  return std::tuple(out, mean, var);
}

std::optional<BackwardSums> cuda_bn_relu_resident_backward(Tensor& dx, const Tensor& dout, const Tensor& x,
                                                           const Tensor& residual, const BatchNormArgs& bn) {
  if (!x.is_cuda() || !dout.is_contiguous(at::MemoryFormat::ChannelsLast) || !on_16_bytes(dout)) return std::nullopt;
  if (residual.defined() && !on_16_bytes(residual)) return std::nullopt;
  const c10::DeviceGuard guard(x.device());
  const cuda::ResidentPlan plan = resident_plan(x, 2);
  if (!plan.group) return std::nullopt;
  const ChannelView view = view_of(x);
  const DType dtype = dtype_of(x, kOp, "x");
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  const Tensor workspace = scratch(cuda::bn_relu_resident_workspace_bytes(view, dtype, plan));
  check_launch(cuda::bn_relu_resident_backward(
                   dx.mutable_data_ptr(), sums.dz.mutable_data_ptr<float>(), sums.dz_xhat.mutable_data_ptr<float>(),
                   dout.const_data_ptr(), x.const_data_ptr(), residual.defined() ? residual.const_data_ptr() : nullptr,
                   dtype, view, norm_of(bn), plan, workspace.mutable_data_ptr(), current_stream()),
               "bn_relu (backward)");
  return sums;
}

}  // namespace ran

#endif
