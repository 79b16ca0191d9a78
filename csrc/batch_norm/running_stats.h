// The running statistics of batch normalisation, updated where a batch's own are taken.
#pragma once

#include <optional>

#include "../common/tensors.h"

namespace ran {

// What nn.BatchNorm2d keeps, as the ops take it: [mean, var], [mean, var, num_batches_tracked], or [] for none.
struct Running {
  Running() = default;
  // Raises unless the tensors fit x's channels. None are kept in a forward pass inside backward: that is an activation
  // checkpoint's second, whose batch has been counted.
  Running(const char* op, const Tensor& x, at::TensorList tensors, std::optional<double> momentum);
  bool kept() const { return mean.defined(); }

  // Blends in one batch's mean and biased variance over `count` values a channel, on a GPU.
  void update(const Tensor& batch_mean, const Tensor& batch_var, int64_t count) const;
  // On the CPU, from the kernels' own before they are rounded, [2][channels]: where what was kept and the batch's
  // cancel, nothing is lost.
  void update(const double* exact, int64_t count) const;
  // An empty batch is counted, and leaves mean and variance, as in torch.
  void count_batch() const;

  Tensor mean, var, batches;       // batches may be undefined where there is a momentum
  std::optional<double> momentum;  // absent: the cumulative average, 1 / batches
};

}  // namespace ran
