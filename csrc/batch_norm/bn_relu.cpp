#include "bn_relu.h"

#include <ATen/Functions.h>

#include <vector>

#include "../common/kernels.h"
#include "cuda.h"
#include "decomposed.h"

namespace ran {
namespace {

const void* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

}  // namespace

Tensor channel_vector(const char* op, const Tensor& x, const OptTensor& t, const char* name) {
  if (!present(t)) return Tensor();
  RAN_CHECK_VALUE(t->dim() == 1 && t->size(0) == x.size(1) && t->device() == x.device(), op, name, " must be [",
                  x.size(1), "] on ", x.device(), ", got ", t->sizes(), " on ", t->device());
  return t->to(acc_type(x)).contiguous();
}

BatchNormArgs::BatchNormArgs(const char* op, const Tensor& x, const OptTensor& weight_, const OptTensor& bias_,
                             const Tensor& mean_, const Tensor& var_, double eps)
    : weight(channel_vector(op, x, weight_, "weight")),
      bias(channel_vector(op, x, bias_, "bias")),
      mean(channel_vector(op, x, mean_, "mean")),
      var(channel_vector(op, x, var_, "var")),
      kernel{pointer(mean), pointer(var), pointer(weight), pointer(bias), eps} {
  RAN_CHECK_VALUE(mean.defined() && var.defined(), op, "mean and var must be tensors, got None");
}

Tensor dense_activation(const char* op, const Tensor& x) {
  RAN_CHECK_VALUE(x.dim() == 4, op, "x must be (N, C, H, W), got ", x.sizes());
  dtype_of(x, op, "x");
  return dense(x);
}

Asked asked_of(const char* op, int64_t paths) {
  RAN_CHECK_VALUE(0 <= paths && paths <= Asked::kMost, op, "paths must be from 0 to ", Asked::kMost, ", got ", paths);
  return Asked::of(paths);
}

void check_statistics(const char* op, const OptTensor& mean, const OptTensor& var) {
  RAN_CHECK_VALUE(present(mean) == present(var), op, "mean and var must be given both or neither");
}

Tensor gradient_like(const char* op, const Tensor& dout, const Tensor& like) {
  check_as(op, "dout", dout, like.sizes(), like);
  return dout.contiguous(format_of(like));
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, const Running& running) {
  const ChannelView view = view_of(x);
  Tensor mean = at::empty({view.channels}, x.options().dtype(acc_type(x))), var = at::empty_like(mean);
  if (x.numel() == 0) {
    running.count_batch();
    return {mean.zero_(), var.zero_()};
  }
  if (x.is_cpu()) {
    std::vector<double> exact(running.kept() ? size_t(2 * view.channels) : 0);
    cpu_kernels(x).batch_norm_stats(mean.data_ptr(), var.data_ptr(), running.kept() ? exact.data() : nullptr,
                                    x.const_data_ptr(), dtype_of(x, kBnRelu, "x"), view);
    if (running.kept()) running.update(exact.data(), view.count());
    return {mean, var};
  }
#ifdef RAN_WITH_CUDA
  if (has_kernels(x)) {
    if (!cuda_batch_norm_stats(mean, var, x, running) && running.kept()) running.update(mean, var, view.count());
    return {mean, var};
  }
#endif
  std::tie(var, mean) = at::var_mean(x, at::IntArrayRef{0, 2, 3}, /*correction=*/0);
  if (running.kept()) running.update(mean, var, view.count());
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_batch(const char* op, const Tensor& x, const OptTensor& weight,
                                                 const OptTensor& bias, double eps, const Running& running,
                                                 [[maybe_unused]] const Asked& asked) {
#ifdef RAN_WITH_CUDA
  if (auto found = cuda_bn_relu_resident(op, x, weight, bias, eps, running, asked.bn_relu)) return *found;
#endif
  const auto [mean, var] = batch_norm_stats(x, running);
  return {bn_relu_apply(x, {op, x, weight, bias, mean, var, eps}), mean, var};
}

Tensor bn_relu_apply(const Tensor& x, const BatchNormArgs& bn) {
  Tensor out = at::empty_like(x);
  if (!has_kernels(x))
    return out.copy_(decomposed::bn_relu(x, bn.weight, bn.bias, bn.mean, bn.var, false, bn.kernel.eps));
  if (x.numel() == 0) return out;
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) {
    cuda_bn_relu_forward(out, x, bn);
    return out;
  }
#endif
  cpu_kernels(x).bn_relu_forward(out.data_ptr(), x.const_data_ptr(), dtype_of(x, kBnRelu, "x"), view_of(x), bn.kernel);
  return out;
}

BackwardSums bn_relu_sums(const Tensor& dout, const Tensor& x, const BatchNormArgs& bn) {
  if (x.numel() == 0) return {at::zeros_like(bn.mean), at::zeros_like(bn.mean)};
  if (!has_kernels(x)) return decomposed::bn_relu_sums(dout, x, bn);
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return cuda_bn_relu_sums(dout, x, bn);
#endif
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  cpu_kernels(x).bn_relu_backward_reduce(sums.dz.data_ptr(), sums.dz_xhat.data_ptr(), dout.const_data_ptr(),
                                         x.const_data_ptr(), dtype_of(x, kBnRelu, "x"), view_of(x), bn.kernel);
  return sums;
}

void bn_relu_dx(Tensor& dx, const Tensor& dout, const Tensor& x, const Tensor& residual, const BatchNormArgs& bn,
                const BackwardSums* sums, double count, const Rows* pieces) {
  if (!has_kernels(x)) {
    dx.copy_(decomposed::bn_relu_dx(dout, x, bn, sums, count));
    if (residual.defined()) dx.add_(residual);
    return;
  }
  if (x.numel() == 0) return;
#ifdef RAN_WITH_CUDA
  if (x.is_cuda()) return cuda_bn_relu_dx(dx, dout, x, residual, bn, sums, count, pieces);
#endif
  cpu_kernels(x).bn_relu_backward_apply(dx.data_ptr(), dout.const_data_ptr(), rows_of(x, pieces), pointer(residual),
                                        sums ? pointer(sums->dz) : nullptr, sums ? pointer(sums->dz_xhat) : nullptr,
                                        count, dtype_of(x, kBnRelu, "x"), view_of(x), bn.kernel);
}

BackwardSums bn_relu_gradients(Tensor& dx, const Tensor& dout, const Tensor& x, const Tensor& residual,
                               const BatchNormArgs& bn, bool batch_stats, [[maybe_unused]] const Asked& asked) {
#ifdef RAN_WITH_CUDA
  if (batch_stats)
    if (auto sums = cuda_bn_relu_resident_backward(dx, dout, x, residual, bn, asked.bn_relu)) return *sums;
#endif
  const BackwardSums sums = bn_relu_sums(dout, x, bn);
  bn_relu_dx(dx, dout, x, residual, bn, batch_stats ? &sums : nullptr, double(view_of(x).count()));
  return sums;
}

}  // namespace ran
