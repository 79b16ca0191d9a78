// Batch normalisation + ReLU on dense tensors, for every op that begins with it.
#pragma once

#include <tuple>

#include "../common/asked.h"
#include "running_stats.h"

namespace ran {

inline constexpr const char* kBnRelu = "bn_relu";  // the op, in what the checks say

// The per-channel vectors of one call in the kernels' precision, kept alive; `kernel` points into them.
struct BatchNormArgs {
  BatchNormArgs(const char* op, const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& mean,
                const Tensor& var, double eps);
  Tensor weight, bias, mean, var;  // weight and bias may be undefined
  BatchNorm<void> kernel;
};

// A per-channel vector in the kernels' precision; undefined where it is absent.
Tensor channel_vector(const char* op, const Tensor& x, const OptTensor& t, const char* name);

// Raises unless x is (N, C, H, W) of a dtype that the kernels take; else x, dense.
Tensor dense_activation(const char* op, const Tensor& x);

// What an op's argument `paths` asks for; raises where it is none of theirs.
Asked asked_of(const char* op, int64_t paths);

// Raises where one of the two was given without the other.
void check_statistics(const char* op, const OptTensor& mean, const OptTensor& var);

// `dout` in the memory format of the dense tensor `like`, whose shape and dtype it must have.
Tensor gradient_like(const char* op, const Tensor& dout, const Tensor& like);

// Mean and biased variance of each channel of x, dense; the running ones are updated.
std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, const Running& running);

// relu(bn(x)), x dense, with the batch's own statistics, and these; the running ones are updated.
std::tuple<Tensor, Tensor, Tensor> bn_relu_batch(const char* op, const Tensor& x, const OptTensor& weight,
                                                 const OptTensor& bias, double eps, const Running& running,
                                                 const Asked& asked);
// The same with statistics that are known.
Tensor bn_relu_apply(const Tensor& x, const BatchNormArgs& bn);

// The values of x, dense: its own, or, where it has none but only its sizes, those of `pieces`.
inline Rows rows_of(const Tensor& x, const Rows* pieces) { return pieces ? *pieces : Rows(x.const_data_ptr()); }

struct BackwardSums {
  Tensor dz, dz_xhat;  // sums over a channel: the gradients of BN's bias and weight
};
BackwardSums bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn);

// dx for batch statistics over `count` values a channel, or, without sums, for given statistics; plus `residual`, the
// gradient that reaches x by another path, undefined where there is none. dx may be dout on the CPU. `pieces` is where
// the values of x are, if x has none but only its sizes.
void bn_relu_dx(Tensor& dx, const Tensor& dout, const Tensor& x, const Tensor& residual, const BatchNormArgs& bn,
                const BackwardSums* sums, double count, const Rows* pieces = nullptr);

// Both at once.
BackwardSums bn_relu_gradients(Tensor& dx, const Tensor& dout, const Tensor& x, const Tensor& residual,
                               const BatchNormArgs& bn, bool batch_stats, const Asked& asked);

// The ops' signatures, for calls through the dispatcher.
using BatchNormStatsOp = std::tuple<Tensor, Tensor>(const Tensor& x, at::TensorList running,
                                                    std::optional<double> momentum);
using BnReluOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                    const OptTensor& mean, const OptTensor& var, bool batch_stats,
                                                    at::TensorList running, std::optional<double> momentum, double eps,
                                                    int64_t paths);

}  // namespace ran
