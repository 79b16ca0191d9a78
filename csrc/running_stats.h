// The running statistics of batch normalisation, updated where a batch's own are taken.
#pragma once

#include <optional>

#include "torch_glue.h"

namespace ran {

// What nn.BatchNorm2d keeps, as the ops take it: [mean, var], [mean, var, num_batches_tracked], or [] for none.
struct Running {
  Running() = default;
  // Raises unless the tensors fit x's channels. None are kept in a forward pass inside backward: that is an activation
  // checkpoint's second, whose batch has been counted.
  Running(const char* op, const Tensor& x, at::TensorList tensors, std::optional<double> momentum);
  bool kept() const { return mean.defined(); }

  // Blends in one batch's mean and biased variance over `count` values a channel.
  void update(const Tensor& batch_mean, const Tensor& batch_var, int64_t count) const;

  Tensor mean, var, batches;       // batches may be undefined where there is a momentum
  std::optional<double> momentum;  // absent: the cumulative average, 1 / batches
};

}  // namespace ran
