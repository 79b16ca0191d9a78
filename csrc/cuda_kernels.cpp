// The CUDA launchers behind the signatures of the CPU's table: stream, workspace, counters and the check of each launch
// are added here. The device is current already (kernels_of).
#ifdef RAN_WITH_CUDA

#include "cuda/kernels.h"
#include "cuda_launch.h"
#include "torch_glue.h"

namespace ran {
namespace {

BatchNorm<float> as_float(const BatchNorm<void>& bn) {
  const auto cast = [](const void* p) { return static_cast<const float*>(p); };
  return {cast(bn.mean), cast(bn.var), cast(bn.weight), cast(bn.bias), bn.eps};
}

void attention_gate_forward(void* out, const void* trunk, const void* mask, DType dtype, GateShape shape) {
  check_launch(cuda::attention_gate_forward(out, trunk, mask, dtype, shape, current_stream()), "attention_gate");
}

void attention_gate_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask,
                             DType dtype, GateShape shape) {
  check_launch(cuda::attention_gate_backward(dtrunk, dmask, dout, trunk, mask, dtype, shape, current_stream()),
               "attention_gate (backward)");
}

void upsample_add_forward(void* out, const void* lower, const void* skip, DType dtype, GateShape shape) {
  check_launch(cuda::upsample_add_forward(out, lower, skip, dtype, shape, current_stream()), "upsample_add");
}

void upsample_add_backward(void* dlower, const void* dout, DType dtype, GateShape shape) {
  check_launch(cuda::upsample_add_backward(dlower, dout, dtype, shape, current_stream()), "upsample_add (backward)");
}

void max_pool_forward(void* out, uint8_t* index, const void* x, DType dtype, GateShape shape) {
  check_launch(cuda::max_pool_forward(out, index, x, dtype, shape, current_stream()), "max_pool2d");
}

void max_pool_backward(void* dx, const void* dout, const uint8_t* index, DType dtype, GateShape shape) {
  check_launch(cuda::max_pool_backward(dx, dout, index, dtype, shape, current_stream()), "max_pool2d (backward)");
}

void bn_relu_forward(void* out, const void* x, DType dtype, ChannelView view, BatchNorm<void> bn) {
  check_launch(cuda::bn_relu_forward(out, x, dtype, view, as_float(bn), current_stream()), "bn_relu");
}

void bn_relu_backward_reduce(void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                             ChannelView view, BatchNorm<void> bn) {
  constexpr const char* kOp = "bn_relu (backward, sums)";
  const ScratchWithCounters scratch(cuda::bn_relu_workspace_bytes(view), cuda::bn_relu_counters(view), kOp);
  check_launch(
      cuda::bn_relu_backward_reduce(static_cast<float*>(sum_dz), static_cast<float*>(sum_dz_xhat), dout, x, dtype, view,
                                    as_float(bn), scratch.workspace(), scratch.counters(), current_stream()),
      kOp);
}

void bn_relu_backward_apply(void* dx, const void* dout, const void* x, const void* residual, const void* sum_dz,
                            const void* sum_dz_xhat, double count, DType dtype, ChannelView view, BatchNorm<void> bn) {
  check_launch(cuda::bn_relu_backward_apply(dx, dout, x, static_cast<const float*>(sum_dz),
                                            static_cast<const float*>(sum_dz_xhat), residual, count, dtype, view,
                                            as_float(bn), current_stream()),
               "bn_relu (backward, dx)");
}

// The convolutions' kernels take other arguments than the CPU's: see cuda_conv1x1.cpp.
bool conv_supported(DType, cpu::ConvShape) { return false; }
bool conv3x3_supported(DType, cpu::ConvShape) { return false; }

constexpr Kernels kTable{
    "cuda",
    attention_gate_forward,
    attention_gate_backward,
    upsample_add_forward,
    upsample_add_backward,
    max_pool_forward,
    max_pool_backward,
    nullptr,  // cuda_bn_relu.cpp: it updates the running statistics too
    bn_relu_forward,
    bn_relu_backward_reduce,
    bn_relu_backward_apply,
    conv_supported,
    nullptr,
    nullptr,
    nullptr,
    conv3x3_supported,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

const Kernels& cuda_kernels() { return kTable; }

}  // namespace ran

#endif
