#ifdef RAN_WITH_CUDA

#include "cuda_conv1x1.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda_dispatch.h"
#include "cuda_launch.h"

namespace ran {
namespace {

constexpr const char* kOp = "bn_relu_conv2d";

cuda::Conv1x1Shape shape_of(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), 1};
}

cuda::Conv1x1Pass pass_of(ConvPass pass) {
  if (pass == ConvPass::forward) return cuda::Conv1x1Pass::forward;
  return pass == ConvPass::dgrad ? cuda::Conv1x1Pass::dgrad : cuda::Conv1x1Pass::wgrad;
}

int architecture(int device) {
  int major = 0, minor = 0;
  check_launch(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  check_launch(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kOp);
  return 10 * major + minor;
}

BatchNorm<float> norm_of(const BatchNormArgs& bn) {
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  return {pointer(bn.mean), pointer(bn.var), pointer(bn.weight), pointer(bn.bias), bn.kernel.eps};
}

// The kernels read 16 bytes at a time; a slice may begin elsewhere.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 ? t.clone(at::MemoryFormat::Preserve) : t;
}
Tensor aligned_pixels(const Tensor& t) { return aligned(t.contiguous(at::MemoryFormat::ChannelsLast)); }

}  // namespace

bool use_cuda_conv1x1(ConvPass pass, const Tensor& x, const Tensor& weight, at::IntArrayRef stride,
                      at::IntArrayRef padding) {
  if (!x.is_cuda() || !x.is_contiguous(at::MemoryFormat::ChannelsLast) || x.numel() == 0) return false;
  if (weight.size(2) != 1 || weight.size(3) != 1) return false;
  if (stride[0] != 1 || stride[1] != 1 || padding[0] != 0 || padding[1] != 0) return false;
  const c10::cuda::CUDAGuard guard(x.device());
  const cuda::Conv1x1Shape shape = shape_of(x, weight);
  const DType dtype = dtype_of(x, kOp, "x");
  return cuda::conv1x1_supported(pass_of(pass), shape, dtype, nullptr) &&
         use_fused_conv1x1(pass_of(pass), shape, dtype, architecture(x.device().index()));
}

Tensor cuda_conv1x1_forward(const Tensor& x_, const BatchNormArgs& bn, const Tensor& weight_, const OptTensor& bias,
                            const OptTensor& residual) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), weight = aligned(weight_.contiguous());
  Tensor y = at::empty({x.size(0), weight.size(0), x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor added_bias = present(bias) ? aligned(bias->contiguous()) : Tensor();
  const Tensor added = present(residual) ? aligned_pixels(gradient_like(kOp, *residual, y)) : Tensor();
  const cuda::Conv1x1Shape shape = shape_of(x, weight);
  const Tensor workspace = scratch(cuda::conv1x1_workspace(cuda::Conv1x1Pass::forward, shape));
  cuda::Conv1x1Forward args{};
  args.y = y.mutable_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.weight = weight.const_data_ptr();
  args.bias = added_bias.defined() ? added_bias.const_data_ptr() : nullptr;
  args.residual = added.defined() ? added.const_data_ptr() : nullptr;
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::conv1x1_forward(args, dtype_of(x, kOp, "x"), current_stream()), kOp);
  return y;
}

std::tuple<Tensor, BackwardSums> cuda_conv1x1_dgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                                    const Tensor& weight_) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), weight = aligned(weight_.contiguous()), dy = aligned_pixels(dout);
  Tensor dz = at::empty_like(x);
  BackwardSums sums{at::empty_like(bn.mean), at::empty_like(bn.mean)};
  const cuda::Conv1x1Shape shape = shape_of(x, weight);
  const Tensor workspace = scratch(cuda::conv1x1_workspace(cuda::Conv1x1Pass::dgrad, shape));
  cuda::Conv1x1Dgrad args{};
  args.dz = dz.mutable_data_ptr();
  args.sum_dz = sums.dz.mutable_data_ptr<float>();
  args.sum_dz_xhat = sums.dz_xhat.mutable_data_ptr<float>();
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.weight = weight.const_data_ptr();
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::conv1x1_dgrad(args, dtype_of(x, kOp, "x"), current_stream()), "bn_relu_conv2d (backward, dx)");
  return {dz, sums};
}

std::tuple<Tensor, Tensor> cuda_conv1x1_wgrad(const Tensor& dout, const Tensor& x_, const BatchNormArgs& bn,
                                              const Tensor& weight, bool want_bias) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = aligned(x_), dy = aligned_pixels(dout);
  Tensor dweight = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  Tensor dbias = want_bias ? at::empty({weight.size(0)}, x.options()) : Tensor();
  const cuda::Conv1x1Shape shape = shape_of(x, weight);
  const Tensor workspace = scratch(cuda::conv1x1_workspace(cuda::Conv1x1Pass::wgrad, shape));
  cuda::Conv1x1Wgrad args{};
  args.dweight = dweight.mutable_data_ptr();
  args.dbias = want_bias ? dbias.mutable_data_ptr() : nullptr;
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.norm = norm_of(bn);
  args.shape = shape;
  args.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::conv1x1_wgrad(args, dtype_of(x, kOp, "x"), current_stream()),
               "bn_relu_conv2d (backward, dweight)");
  return {dweight, dbias};
}

}  // namespace ran

#endif
