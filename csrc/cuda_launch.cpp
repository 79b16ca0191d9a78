#ifdef RAN_WITH_CUDA

#include "cuda_launch.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace ran {
namespace {

// Which capture into a graph `stream` is in; 0: none.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_launch(cudaStreamGetCaptureInfo(stream, &status, &id), "bn_relu");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

struct Buffer {
  unsigned long long capture;
  at::Tensor words;
};

}  // namespace

// One buffer a stream, so that only its first launch is preceded by a memset. A graph gets one of its own, for it may
// be replayed beside what else its stream does: the memset is captured with it. (Two streams joined in one capture have
// two.)
Counters::Counters(size_t count) {
  using Key = std::tuple<int, cudaStream_t, bool>;
  static std::mutex mutex;
  static auto& buffers = *new std::map<Key, Buffer>;  // never destroyed: at exit the driver may be gone before it
  const cudaStream_t stream = current_stream();
  const unsigned long long capture = capture_of(stream);
  const std::lock_guard<std::mutex> lock(mutex);
  Buffer& buffer = buffers[{c10::cuda::current_device(), stream, capture != 0}];
  if (buffer.capture != capture || !buffer.words.defined() || size_t(buffer.words.numel()) < count)
    buffer = {capture, at::zeros({int64_t(std::max<size_t>(count, 1024))}, current_device().dtype(at::kInt))};
  words_ = buffer.words;
}

}  // namespace ran

#endif
