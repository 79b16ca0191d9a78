// What batch normalisation on a GPU has beyond the table of kernels: running statistics updated in the launch that
// takes the batch's, and one kernel each way where a tensor fits in shared memory.
#pragma once

#ifdef RAN_WITH_CUDA

#include <optional>

#include "bn_relu.h"
#include "cuda/kernels.h"

namespace ran {

// `running` for a launch; none where the kernels cannot take it, which is so unless it is float32.
std::optional<cuda::RunningStatistics> in_launch(const Running& running);

// Fills mean and biased var of x, dense, (N, C, H, W); whether `running` was updated too.
bool cuda_batch_norm_stats(Tensor& mean, Tensor& var, const Tensor& x, const Running& running);

// As bn_relu_batch() and bn_relu_gradients(), or nothing where x is not on a GPU, not channels_last, off a 16-byte
// boundary or too large, or where streaming is chosen (cuda_dispatch.h).
std::optional<std::tuple<Tensor, Tensor, Tensor>> cuda_bn_relu_resident(const char* op, const Tensor& x,
                                                                        const OptTensor& weight, const OptTensor& bias,
                                                                        double eps, const Running& running);
std::optional<BackwardSums> cuda_bn_relu_resident_backward(Tensor& dx, const Tensor& dout, const Tensor& x,
                                                           const Tensor& residual, const BatchNormArgs& bn);

// The plan of the kernel that holds `tensors` tensors of x's size (1: forward, 2: backward); its group is 0 where there
// is none, or another way is chosen. `why`, if given, becomes the reason in words.
cuda::ResidentPlan resident_plan(const Tensor& x, int tensors, std::string* why = nullptr);

}  // namespace ran

#endif
