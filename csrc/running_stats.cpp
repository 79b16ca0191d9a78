// The running statistics of batch normalisation: an op of its own, so that the others stay functional.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "torch_glue.h"

namespace ran {
namespace {

// One loop over both vectors: four small ATen ops a layer would show in a training step's time.
void blend(Tensor& running_mean, Tensor& running_var, const Tensor& mean, const Tensor& var, double factor,
           double unbiased) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, running_mean.scalar_type(), "update_running_stats", [&] {
    auto running_m = running_mean.accessor<scalar_t, 1>(), running_v = running_var.accessor<scalar_t, 1>();
    const Tensor m64 = mean.to(at::kDouble), v64 = var.to(at::kDouble);
    const auto m = m64.accessor<const double, 1>(), v = v64.accessor<const double, 1>();
    for (int64_t c = 0; c < m.size(0); ++c) {
      running_m[c] = scalar_t((1 - factor) * double(running_m[c]) + factor * m[c]);
      running_v[c] = scalar_t((1 - factor) * double(running_v[c]) + factor * unbiased * v[c]);
    }
  });
}

// A GPU's: all of it is queued, nothing is read back, so that it can be captured into a graph. Its factor stays on the
// device where it depends on the number of batches.
void blend_on_device(Tensor& running_mean, Tensor& running_var, const Tensor& batches, const Tensor& mean,
                     const Tensor& var, std::optional<double> momentum, double unbiased) {
  const Tensor m = mean.to(running_mean.scalar_type()), v = (var * unbiased).to(running_var.scalar_type());
  if (momentum) {
    running_mean.lerp_(m, *momentum);
    running_var.lerp_(v, *momentum);
    return;
  }
  const Tensor factor = at::reciprocal(batches.to(running_mean.scalar_type()));
  running_mean.lerp_(m, factor);
  running_var.lerp_(v, factor);
}

// Blends one batch's statistics into the running ones. A forward pass inside backward is an activation checkpoint's
// second: its batch has been counted.
void update_running_stats(Tensor running_mean, Tensor running_var, const OptTensor& num_batches_tracked,
                          const Tensor& mean, const Tensor& var, int64_t count, std::optional<double> momentum) {
  RAN_CHECK_VALUE(momentum.has_value() || present(num_batches_tracked), "update_running_stats",
                  "momentum=None (cumulative average) needs num_batches_tracked");
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  at::NoGradGuard no_grad;
  const double unbiased = count > 1 ? double(count) / double(count - 1) : 1.0;
  if (!running_mean.is_cpu()) {
    const Tensor batches = num_batches_tracked.value_or(Tensor());
    if (batches.defined()) batches.add_(1);
    return blend_on_device(running_mean, running_var, batches, mean, var, momentum, unbiased);
  }
  double factor = momentum.value_or(0.0);
  if (present(num_batches_tracked)) {
    const int64_t batches = *num_batches_tracked->mutable_data_ptr<int64_t>() += 1;
    if (!momentum) factor = 1.0 / double(batches);
  }
  blend(running_mean, running_var, mean, var, factor, unbiased);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def(
      "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor "
      "mean, Tensor var, int count, float? momentum) -> ()");
}
TORCH_LIBRARY_IMPL(ran_ext, CPU, m) { m.impl("update_running_stats", update_running_stats); }
#ifdef RAN_WITH_CUDA
TORCH_LIBRARY_IMPL(ran_ext, CUDA, m) { m.impl("update_running_stats", update_running_stats); }
#endif

}  // namespace ran
