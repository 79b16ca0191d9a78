// Batch normalisation + ReLU on a GPU: the kernels that stream a tensor, those that hold it in shared memory, and the
// choice between the two.
#pragma once

#ifdef RAN_WITH_CUDA

#include <optional>
#include <string>

#include "../common/measured.h"
#include "../cuda/kernels.h"
#include "bn_relu.h"

namespace ran {

// The vectors of x on a GPU, which are float there.
BatchNorm<float> norm_of(const BatchNormArgs& bn);

// `running` for a launch; none where the kernels cannot take it, which is so unless it is float32.
std::optional<cuda::RunningStatistics> in_launch(const Running& running);

// Fills mean and biased var of x, dense, (N, C, H, W); whether `running` was updated too.
bool cuda_batch_norm_stats(Tensor& mean, Tensor& var, const Tensor& x, const Running& running);

// x + bias + residual, and the sum's mean and biased var, in one pass over x; nothing where the kernel does not take
// them. Fills mean and var; `running` is updated.
std::optional<Tensor> cuda_add_with_stats(Tensor& mean, Tensor& var, const Tensor& x, const OptTensor& bias,
                                          const OptTensor& residual, const Running& running);
// The sum of each channel, in x's dtype: a convolution's gradient of its bias. Nothing where the kernel does not take
// x.
std::optional<Tensor> cuda_channel_sums(const Tensor& x);

// As bn_relu_apply(), bn_relu_sums() and bn_relu_dx(), x not empty.
void cuda_bn_relu_forward(Tensor& out, const Tensor& x, const BatchNormArgs& bn);
BackwardSums cuda_bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn);
void cuda_bn_relu_dx(Tensor& dx, const Tensor& dout, const Tensor& x, const Tensor& residual, const BatchNormArgs& bn,
                     const BackwardSums* sums, double count, const Rows* pieces);

// As bn_relu_batch() and bn_relu_gradients(), or nothing where x is not on a GPU or is streamed.
std::optional<std::tuple<Tensor, Tensor, Tensor>> cuda_bn_relu_resident(const char* op, const Tensor& x,
                                                                        const OptTensor& weight, const OptTensor& bias,
                                                                        double eps, const Running& running,
                                                                        BnReluAsked asked);
std::optional<BackwardSums> cuda_bn_relu_resident_backward(Tensor& dx, const Tensor& dout, const Tensor& x,
                                                           const Tensor& residual, const BatchNormArgs& bn,
                                                           BnReluAsked asked);

// What BN-ReLU's forward pass, or its backward, runs on. Resident: one kernel that holds x (and its gradient) in shared
// memory; streaming: kernels for any size, with the reason.
enum class BnReluPath {
  resident,
  streaming_dtype,  // or x is empty
  streaming_layout,
  streaming_alignment,
  streaming_decided,  // as faster, or by set_bn_relu
  streaming_size,
};
// A path, from where the choice comes, and the resident kernel's plan where it is that.
struct BnReluChoice {
  BnReluPath path;
  Source source = Source::only;
  cuda::ResidentPlan plan = {};
};
BnReluChoice choose_bn_relu(const Tensor& x, bool backward, BnReluAsked asked);
// The choice in words, for ran_ext.explain.
std::string describe(const BnReluChoice& choice);

}  // namespace ran

#endif
