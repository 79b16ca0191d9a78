// Around a CUDA launcher: the current device's stream, scratch and counters, and the check of what it returns. These
// headers of c10 need no more of CUDA than its runtime; ATen/cuda/CUDAContext.h would need cuBLAS's, cuSPARSE's and
// cuSOLVER's.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace ran {

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline at::TensorOptions current_device() { return at::TensorOptions().device(at::kCUDA, c10::cuda::current_device()); }

// Bytes of torch's caching allocator, for launches on the current stream; they may be given back once those are queued.
inline at::Tensor scratch(size_t bytes) { return at::empty({int64_t(bytes)}, current_device().dtype(at::kByte)); }

// The kernels read and write 16 bytes at a time; a slice may begin elsewhere.
inline bool on_16_bytes(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }
// The tensor as the kernels read it: itself, or a copy where it begins elsewhere, or is not channels_last.
inline at::Tensor aligned(const at::Tensor& t) { return on_16_bytes(t) ? t : t.clone(at::MemoryFormat::Preserve); }
inline at::Tensor aligned_pixels(const at::Tensor& t) { return aligned(t.contiguous(at::MemoryFormat::ChannelsLast)); }

inline void check_launch(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call of CUDA would report this one's error again
  TORCH_CHECK(false, op, ": CUDA did not take the launch on device ", int(c10::cuda::current_device()), ": ",
              cudaGetErrorName(error), " (", cudaGetErrorString(error),
              "); `python -m ran_ext info` says which architectures the kernels were built for, and "
              "ran_ext.set_backend('reference') does without them");
}

// Scratch with `count` words behind it that are zero when the launch begins. Both are of this launch alone, so that no
// memory outlives it: a graph's pool, of which torch.compile knows every tensor, may hold nothing else.
class ScratchWithCounters {
 public:
  ScratchWithCounters(size_t bytes, size_t count, const char* op)
      : bytes_((bytes + 15) / 16 * 16), memory_(scratch(bytes_ + count * sizeof(unsigned))) {
    if (count > 0) check_launch(cudaMemsetAsync(counters(), 0, count * sizeof(unsigned), current_stream()), op);
  }
  void* workspace() const { return memory_.mutable_data_ptr(); }
  unsigned* counters() const { return reinterpret_cast<unsigned*>(static_cast<char*>(workspace()) + bytes_); }

 private:
  size_t bytes_;
  at::Tensor memory_;
};

inline int device_attribute(cudaDeviceAttr name, const char* op) {
  int value = 0;
  check_launch(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()), op);
  return value;
}

// Whether an unknown shape is to be tuned where it is first met: under torch.backends.cudnn.benchmark, and while no
// graph is being captured.
inline bool tunes_at_first_call() {
  return at::globalContext().benchmarkCuDNN() && !at::globalContext().deterministicAlgorithms() &&
         c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

}  // namespace ran
