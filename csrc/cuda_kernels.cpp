// The CUDA launchers behind the signatures of the CPU's table: stream, workspace, counters and the check of each launch
// are added here. The device is current already (kernels_of).
#ifdef RAN_WITH_CUDA

#include <ATen/ops/zeros.h>

#include <map>
#include <mutex>

#include "cuda/kernels.h"
#include "cuda_launch.h"
#include "torch_glue.h"

namespace ran {
namespace {

BatchNorm<float> as_float(const BatchNorm<void>& bn) {
  const auto cast = [](const void* p) { return static_cast<const float*>(p); };
  return {cast(bn.mean), cast(bn.var), cast(bn.weight), cast(bn.bias), bn.eps};
}

// Which capture into a graph `stream` is in; 0: none.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_launch(cudaStreamGetCaptureInfo(stream, &status, &id), "bn_relu");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// At least `count` counters, zero before the launch that uses them and, by that launch, after it. One buffer a stream,
// so that only its first launch is preceded by a memset. A graph gets one of its own, for it may be replayed beside
// what else its stream does: the memset is captured with it. (Two streams joined in one capture have two.)
Tensor counters(size_t count, cudaStream_t stream) {
  struct Buffer {
    unsigned long long capture;
    Tensor words;
  };
  using Key = std::tuple<int, cudaStream_t, bool>;
  static std::mutex mutex;
  static auto& buffers = *new std::map<Key, Buffer>;  // never destroyed: at exit the driver may be gone before it
  const unsigned long long capture = capture_of(stream);
  const std::lock_guard<std::mutex> lock(mutex);
  Buffer& buffer = buffers[{c10::cuda::current_device(), stream, capture != 0}];
  if (buffer.capture != capture || !buffer.words.defined() || size_t(buffer.words.numel()) < count)
    buffer = {capture, at::zeros({int64_t(std::max<size_t>(count, 1024))}, current_device().dtype(at::kInt))};
  return buffer.words;
}

struct Reduction {
  explicit Reduction(const ChannelView& view)
      : stream(current_stream()),
        workspace(scratch(cuda::bn_relu_workspace_bytes(view))),
        words(counters(cuda::bn_relu_counters(view), stream)) {}
  unsigned* counts() const { return reinterpret_cast<unsigned*>(words.mutable_data_ptr<int>()); }
  cudaStream_t stream;
  Tensor workspace, words;
};

void attention_gate_forward(void* out, const void* trunk, const void* mask, DType dtype, GateShape shape) {
  check_launch(cuda::attention_gate_forward(out, trunk, mask, dtype, shape, current_stream()), "attention_gate");
}

void attention_gate_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask,
                             DType dtype, GateShape shape) {
  check_launch(cuda::attention_gate_backward(dtrunk, dmask, dout, trunk, mask, dtype, shape, current_stream()),
               "attention_gate (backward)");
}

void batch_norm_stats(void* mean, void* var, const void* x, DType dtype, ChannelView view) {
  const Reduction with(view);
  check_launch(cuda::bn_relu_statistics(static_cast<float*>(mean), static_cast<float*>(var), x, dtype, view, {},
                                        with.workspace.mutable_data_ptr(), with.counts(), with.stream),
               "batch_norm_stats");
}

void bn_relu_forward(void* out, const void* x, DType dtype, ChannelView view, BatchNorm<void> bn) {
  check_launch(cuda::bn_relu_forward(out, x, dtype, view, as_float(bn), current_stream()), "bn_relu");
}

void bn_relu_backward_reduce(void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                             ChannelView view, BatchNorm<void> bn) {
  const Reduction with(view);
  check_launch(
      cuda::bn_relu_backward_reduce(static_cast<float*>(sum_dz), static_cast<float*>(sum_dz_xhat), dout, x, dtype, view,
                                    as_float(bn), with.workspace.mutable_data_ptr(), with.counts(), with.stream),
      "bn_relu (backward, sums)");
}

void bn_relu_backward_apply(void* dx, const void* dout, const void* x, const void* sum_dz, const void* sum_dz_xhat,
                            double count, DType dtype, ChannelView view, BatchNorm<void> bn) {
  check_launch(cuda::bn_relu_backward_apply(dx, dout, x, static_cast<const float*>(sum_dz),
                                            static_cast<const float*>(sum_dz_xhat), nullptr, count, dtype, view,
                                            as_float(bn), current_stream()),
               "bn_relu (backward, dx)");
}

// The convolutions' kernels take other arguments than the CPU's: see cuda_conv1x1.cpp.
bool conv_supported(DType, cpu::ConvShape) { return false; }

constexpr Kernels kTable{
    "cuda",
    attention_gate_forward,
    attention_gate_backward,
    batch_norm_stats,
    bn_relu_forward,
    bn_relu_backward_reduce,
    bn_relu_backward_apply,
    conv_supported,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

const Kernels& cuda_kernels() { return kTable; }

}  // namespace ran

#endif
