#include "running_stats.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>

namespace ran {
namespace {

// From the biased to the unbiased variance.
double bessel(int64_t count) { return count > 1 ? double(count) / double(count - 1) : 1.0; }

// A GPU's: all of it is queued, nothing is read back, so that it can be captured into a graph. Its factor stays on the
// device where it depends on the number of batches.
void blend_on_device(const Running& running, const Tensor& mean, const Tensor& var, double unbiased) {
  const Tensor m = mean.to(running.mean.scalar_type()), v = (var * unbiased).to(running.var.scalar_type());
  if (running.momentum) {
    running.mean.lerp_(m, *running.momentum);
    running.var.lerp_(v, *running.momentum);
    return;
  }
  const Tensor factor = at::reciprocal(running.batches.to(running.mean.scalar_type()));
  running.mean.lerp_(m, factor);
  running.var.lerp_(v, factor);
}

}  // namespace

Running::Running(const char* op, const Tensor& x, at::TensorList tensors, std::optional<double> momentum_) {
  if (tensors.empty()) return;
  RAN_CHECK_VALUE(tensors.size() == 2 || tensors.size() == 3, op,
                  "running statistics must be mean, variance and perhaps the number of batches, got ", tensors.size(),
                  " tensors");
  for (const Tensor& t : tensors.slice(0, 2)) {
    dtype_of(t, op, "running statistics");
    RAN_CHECK_VALUE(t.dim() == 1 && t.size(0) == x.size(1) && t.device() == x.device(), op,
                    "running statistics must be [", x.size(1), "] on ", x.device(), ", got ", t.sizes(), " on ",
                    t.device());
  }
  RAN_CHECK_TYPE(tensors[0].scalar_type() == tensors[1].scalar_type(), op,
                 "the running mean and variance must have the same dtype, got ", tensors[0].scalar_type(), " and ",
                 tensors[1].scalar_type());
  RAN_CHECK_VALUE(momentum_ || tensors.size() == 3, op, "momentum=None (cumulative average) needs num_batches_tracked");
  if (tensors.size() == 3)
    RAN_CHECK_VALUE(
        tensors[2].numel() == 1 && tensors[2].scalar_type() == at::kLong && tensors[2].device() == x.device(), op,
        "num_batches_tracked must be one int64 on ", x.device(), ", got ", tensors[2].scalar_type(), " ",
        tensors[2].sizes(), " on ", tensors[2].device());
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  mean = tensors[0];
  var = tensors[1];
  if (tensors.size() == 3) batches = tensors[2];
  momentum = momentum_;
}

void Running::count_batch() const {
  at::NoGradGuard no_grad;
  if (batches.defined()) batches.add_(1);
}

void Running::update(const Tensor& batch_mean, const Tensor& batch_var, int64_t count) const {
  at::NoGradGuard no_grad;
  count_batch();
  blend_on_device(*this, batch_mean, batch_var, bessel(count));
}

// One loop over both vectors: four small ATen ops a layer would show in a training step's time.
void Running::update(const double* exact, int64_t count) const {
  double factor = momentum.value_or(0.0);
  if (batches.defined()) {
    const int64_t seen = *batches.mutable_data_ptr<int64_t>() += 1;
    if (!momentum) factor = 1.0 / double(seen);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, mean.scalar_type(), "update_running_stats", [&] {
    const auto blend = [&](Tensor kept, const double* batch, double scale) {
      auto values = kept.accessor<scalar_t, 1>();
      for (int64_t c = 0; c < values.size(0); ++c)
        values[c] = scalar_t((1 - factor) * double(values[c]) + factor * scale * batch[c]);
    };
    blend(mean, exact, 1.0);
    blend(var, exact + mean.size(0), bessel(count));
  });
}

}  // namespace ran
