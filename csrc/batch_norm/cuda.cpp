#ifdef RAN_WITH_CUDA

#include "cuda.h"

#include <ATen/Functions.h>

#include "../common/cuda_launch.h"

namespace ran {
namespace {

cuda::Device device_of() {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, kBnRelu);
  return {device_attribute(cudaDevAttrMultiProcessorCount, kBnRelu),
          size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kBnRelu)), major >= 9 ? 8 : 1};
}

bool is_float_vector(const Tensor& t) { return t.scalar_type() == at::kFloat && t.is_contiguous(); }

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

}  // namespace

BatchNorm<float> norm_of(const BatchNormArgs& bn) {
  return {floats(bn.mean), floats(bn.var), floats(bn.weight), floats(bn.bias), bn.kernel.eps};
}

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
  const ScratchWithCounters scratch(cuda::bn_relu_workspace_bytes(view), cuda::bn_relu_counters(view), kBnRelu);
  const auto kept = in_launch(running);
  check_launch(
      cuda::bn_relu_statistics(mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>(), x.const_data_ptr(),
                               dtype_of(x, kBnRelu, "x"), view, kept.value_or(cuda::RunningStatistics{}),
                               scratch.workspace(), scratch.counters(), current_stream()),
      "batch_norm_stats");
  return kept.has_value();
}

std::optional<Tensor> cuda_add_with_stats(Tensor& mean, Tensor& var, const Tensor& x, const OptTensor& bias,
                                          const OptTensor& residual, const Running& running) {
  const auto data = [](const OptTensor& t) { return present(t) ? t->const_data_ptr() : nullptr; };
  const auto as_x = [&](const OptTensor& t) { return !present(t) || t->scalar_type() == x.scalar_type(); };
  constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;
  if (!x.is_cuda() || x.scalar_type() == at::kDouble || !x.is_contiguous(kChannelsLast)) return std::nullopt;
  if (!as_x(bias) || !as_x(residual) || (present(bias) && !bias->is_contiguous())) return std::nullopt;
  if (present(residual) && !residual->is_contiguous(kChannelsLast)) return std::nullopt;
  const c10::DeviceGuard guard(x.device());
  const ChannelView view = view_of(x);
  const DType dtype = dtype_of(x, kBnRelu, "x");
  if (!cuda::add_with_statistics_takes(x.const_data_ptr(), data(bias), data(residual), dtype, view))
    return std::nullopt;
  Tensor sum = at::empty_like(x);
  mean = at::empty({view.channels}, x.options().dtype(at::kFloat)), var = at::empty_like(mean);
  const ScratchWithCounters scratch(cuda::bn_relu_workspace_bytes(view), cuda::bn_relu_counters(view), kBnRelu);
  const auto kept = in_launch(running);
  check_launch(cuda::add_with_statistics(sum.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                                         var.mutable_data_ptr<float>(), x.const_data_ptr(), data(bias), data(residual),
                                         dtype, view, kept.value_or(cuda::RunningStatistics{}), scratch.workspace(),
                                         scratch.counters(), current_stream()),
               "add_with_stats");
  if (!kept && running.kept()) running.update(mean, var, view.count());
  return sum;
}

std::optional<Tensor> cuda_channel_sums(const Tensor& x) {
  if (!x.is_cuda() || x.numel() == 0 || x.scalar_type() == at::kDouble) return std::nullopt;
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return std::nullopt;
  const c10::DeviceGuard guard(x.device());
  const ChannelView view = view_of(x);
  if (view.inner != 1) return std::nullopt;  // NCHW too, as one channel is
  Tensor sums = at::empty({view.channels}, x.options());
  const ScratchWithCounters scratch(cuda::bn_relu_workspace_bytes(view), cuda::bn_relu_counters(view), kBnRelu);
  check_launch(cuda::channel_sums(sums.mutable_data_ptr(), x.const_data_ptr(), dtype_of(x, kBnRelu, "x"), view,
                                  scratch.workspace(), scratch.counters(), current_stream()),
               "channel_sums");
  return sums;
}

void cuda_bn_relu_forward(Tensor& out, const Tensor& x, const BatchNormArgs& bn) {
  const c10::DeviceGuard guard(x.device());
  check_launch(cuda::bn_relu_forward(out.mutable_data_ptr(), x.const_data_ptr(), dtype_of(x, kBnRelu, "x"), view_of(x),
                                     norm_of(bn), current_stream()),
               kBnRelu);
}

BackwardSums cuda_bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn) {
  const c10::DeviceGuard guard(x.device());
  const ChannelView view = view_of(x);
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  const ScratchWithCounters scratch(cuda::bn_relu_workspace_bytes(view), cuda::bn_relu_counters(view), kBnRelu);
  check_launch(cuda::bn_relu_backward_reduce(sums.dz.mutable_data_ptr<float>(), sums.dz_xhat.mutable_data_ptr<float>(),
                                             dout.const_data_ptr(), x.const_data_ptr(), dtype_of(x, kBnRelu, "x"), view,
                                             norm_of(bn), scratch.workspace(), scratch.counters(), current_stream()),
               "bn_relu (backward, sums)");
  return sums;
}

void cuda_bn_relu_dx(Tensor& dx, const Tensor& dout, const Tensor& x, const Tensor& residual, const BatchNormArgs& bn,
                     const BackwardSums* sums, double count, const Rows* pieces) {
  const c10::DeviceGuard guard(x.device());
  check_launch(cuda::bn_relu_backward_apply(dx.mutable_data_ptr(), dout.const_data_ptr(), rows_of(x, pieces),
                                            sums ? floats(sums->dz) : nullptr, sums ? floats(sums->dz_xhat) : nullptr,
                                            residual.defined() ? residual.const_data_ptr() : nullptr, count,
                                            dtype_of(x, kBnRelu, "x"), view_of(x), norm_of(bn), current_stream()),
               "bn_relu (backward, dx)");
}

// ------------------------------------------------------------------------------------------------------- the choice

BnReluChoice choose_bn_relu(const Tensor& x, bool backward, BnReluAsked asked) {
  if (x.numel() == 0 || x.scalar_type() == at::kDouble) return {BnReluPath::streaming_dtype};
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) return {BnReluPath::streaming_layout};
  if (!on_16_bytes(x)) return {BnReluPath::streaming_alignment};
  const DType dtype = dtype_of(x, kBnRelu, "x");
  const cuda::ResidentPlan plan = cuda::bn_relu_resident_plan(view_of(x), dtype, device_of(), backward ? 2 : 1);
  if (!plan.group) return {BnReluPath::streaming_size};
  if (asked == BnReluAsked::resident) return {BnReluPath::resident, Source::asked, plan};
  if (asked == BnReluAsked::streaming) return {BnReluPath::streaming_decided, Source::asked};
  const PassShape shape{x.get_device(),
                        0,
                        backward ? Pass::bn_relu_backward : Pass::bn_relu,
                        dtype,
                        {x.size(0), x.size(2), x.size(3), x.size(1), x.size(1), 0, 0, 0, 0, 0, 0}};
  const Choice choice =
      choose_measured(shape, {Path::resident, Path::streaming}, Path::resident, tunes_at_first_call());
  if (choice.path == Path::streaming) return {BnReluPath::streaming_decided, choice.source};
  return {BnReluPath::resident, choice.source, plan};
}

std::string describe(const BnReluChoice& choice) {
  switch (choice.path) {
    case BnReluPath::streaming_dtype:
      return "there is no kernel for this dtype or an empty x";
    case BnReluPath::streaming_layout:
      return "x is not channels_last";
    case BnReluPath::streaming_alignment:
      return "x does not begin on a 16-byte boundary";
    case BnReluPath::streaming_size:
      return "x is too large for the blocks' shared memory, or its channels are no multiple of 8";
    case BnReluPath::streaming_decided:
      return choice.source == Source::asked ? "set_bn_relu('streaming') was chosen" : "streaming is faster";
    case BnReluPath::resident:
      break;
  }
  return "one kernel, held in shared memory";
}

// ----------------------------------------------------------------------------------------------------- shared memory

std::optional<std::tuple<Tensor, Tensor, Tensor>> cuda_bn_relu_resident(const char* op, const Tensor& x,
                                                                        const OptTensor& weight, const OptTensor& bias,
                                                                        double eps, const Running& running,
                                                                        BnReluAsked asked) {
  if (!x.is_cuda()) return std::nullopt;
  const c10::DeviceGuard guard(x.device());
  const BnReluChoice choice = choose_bn_relu(x, false, asked);
  if (choice.path != BnReluPath::resident) return std::nullopt;
  const cuda::ResidentPlan& plan = choice.plan;
  const ChannelView view = view_of(x);
  const DType dtype = dtype_of(x, op, "x");
  Tensor out = at::empty_like(x), mean = at::empty({view.channels}, x.options().dtype(at::kFloat));
  Tensor var = at::empty_like(mean);
  const BatchNormArgs bn(op, x, weight, bias, mean, var, eps);
  const ScratchWithCounters scratch(cuda::bn_relu_resident_workspace_bytes(view, dtype, plan),
                                    cuda::bn_relu_counters(view), op);
  const auto kept = in_launch(running);
  check_launch(
      cuda::bn_relu_resident_forward(out.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                                     var.mutable_data_ptr<float>(), x.const_data_ptr(), floats(bn.weight),
                                     floats(bn.bias), dtype, view, eps, kept.value_or(cuda::RunningStatistics{}), plan,
                                     scratch.workspace(), scratch.counters(), current_stream()),
      op);
  if (running.kept() && !kept) running.update(mean, var, view.count());
  return std::tuple(out, mean, var);
}

std::optional<BackwardSums> cuda_bn_relu_resident_backward(Tensor& dx, const Tensor& dout, const Tensor& x,
                                                           const Tensor& residual, const BatchNormArgs& bn,
                                                           BnReluAsked asked) {
  if (!x.is_cuda() || !dout.is_contiguous(at::MemoryFormat::ChannelsLast) || !on_16_bytes(dout)) return std::nullopt;
  if (residual.defined() && !on_16_bytes(residual)) return std::nullopt;
  const c10::DeviceGuard guard(x.device());
  const BnReluChoice choice = choose_bn_relu(x, true, asked);
  if (choice.path != BnReluPath::resident) return std::nullopt;
  const cuda::ResidentPlan& plan = choice.plan;
  const ChannelView view = view_of(x);
  const DType dtype = dtype_of(x, kBnRelu, "x");
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
