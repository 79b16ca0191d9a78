// Batch normalisation, an activation and a convolution, of which backward keeps the raw input: for ran_ext/_recipe.py.
#pragma once

#include <string>
#include <vector>

#include "../common/tensors.h"

namespace ran {

// act(bn(x)) on the CPU with given statistics; `batch_stats`: they are x's own, which the derivative must know. act, a
// and b as the op bn_act takes them.
Tensor bn_act_recomputed(const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias, const Tensor& mean,
                         const Tensor& var, bool batch_stats, double eps, const std::string& act, double a, double b);

// The convolution of such a value, which is not kept for backward. `paths`: the op conv2d's argument; without, the
// convolution is torch's.
Tensor bn_act_conv2d(const Tensor& value, const Tensor& x, const OptTensor& bn_weight, const OptTensor& bn_bias,
                     const Tensor& mean, const Tensor& var, bool batch_stats, double eps, const std::string& act,
                     double a, double b, const Tensor& weight, const OptTensor& bias,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, int64_t groups, std::optional<int64_t> paths);

}  // namespace ran
