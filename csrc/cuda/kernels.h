// Launchers of the CUDA kernels. Order of arguments: outputs, inputs, dtype, sizes, options, workspace, stream.
//
// Tensors are dense, NCHW or channels_last, float32, bfloat16 or float16; sums and per-channel vectors are float. Each
// returns what cudaGetLastError() does after its launches (cudaErrorInvalidValue for another dtype). Nothing allocates
// or synchronises, every sum has a fixed order, and all may be captured into a graph.
//
// `workspace`: scratch on 16 bytes, its contents irrelevant before and after. `counters`: words that are zero before
// the launch; it leaves them zero. Neither may be shared by two streams.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(RAN_EMULATE)
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../common/types.h"

namespace ran::cuda {

// Whether the kernels that take Rows read these pieces, of 16-bit values: whole vectors of channels, on 16 bytes.
inline constexpr int kMostPieces = 64;
inline bool reads_pieces(const Rows& x) {
  bool takes = 0 < x.count && x.count <= kMostPieces;
  for (int64_t i = 0; takes && i < x.count; ++i)
    takes = x.pieces[i].channels % 8 == 0 && reinterpret_cast<uintptr_t>(x.pieces[i].data) % 16 == 0;
  return takes;
}

// out = (1 + sigmoid(mask)) * trunk, the mask up-sampled (nearest) by shape.scale.
cudaError_t attention_gate_forward(void* out, const void* trunk, const void* mask, DType dtype, GateShape shape,
                                   cudaStream_t stream);
cudaError_t attention_gate_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask,
                                    DType dtype, GateShape shape, cudaStream_t stream);
// The same of a mask that is up-sampled as torch's interpolate(mode="bilinear", align_corners=False) does, by any
// scale.
cudaError_t attention_gate_bilinear_forward(void* out, const void* trunk, const void* mask, DType dtype,
                                            GateShape shape, cudaStream_t stream);
cudaError_t attention_gate_bilinear_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk,
                                             const void* mask, DType dtype, GateShape shape, cudaStream_t stream);

// out (n, c, h, w) = lower up-sampled (nearest) by shape.scale and cropped, + skip; lower has the mask's size in
// `shape`. skip may be null. The gradient of skip is dout itself.
cudaError_t upsample_add_forward(void* out, const void* lower, const void* skip, DType dtype, GateShape shape,
                                 cudaStream_t stream);
cudaError_t upsample_add_backward(void* dlower, const void* dout, DType dtype, GateShape shape, cudaStream_t stream);

// 2x2 windows at stride 2, the last ones cut off at the border (ceil_mode): x is (n, c, h, w), out and index have the
// mask's size in `shape`, whose scale is 2. index: 2 * row + column of the maximum in its window; the first of equals,
// the last NaN.
cudaError_t max_pool_forward(void* out, uint8_t* index, const void* x, DType dtype, GateShape shape,
                             cudaStream_t stream);
cudaError_t max_pool_backward(void* dx, const void* dout, const uint8_t* index, DType dtype, GateShape shape,
                              cudaStream_t stream);

// What nn.BatchNorm2d keeps; updated on the device, in the launch that ends the statistics.
struct RunningStatistics {
  float* mean = nullptr;       // null: none are kept
  float* var = nullptr;        // takes the unbiased variance
  int64_t* batches = nullptr;  // num_batches_tracked, incremented; may be null where momentum is not negative
  float momentum = 0.1f;       // negative: cumulative average, 1 / num_batches_tracked
};

// Streaming variant, for any size: statistics, then forward; backward_reduce, then backward_apply.
//
// mean and biased variance of each channel; view.count() > 0.
cudaError_t bn_relu_statistics(float* mean, float* var, const void* x, DType dtype, ChannelView view,
                               RunningStatistics running, void* workspace, unsigned* counters, cudaStream_t stream);
// sum = x + bias + residual, either null, and the statistics of the sum in the same pass; not in place. Takes
// channels_last, whole vectors of channels, everything on 16 bytes.
bool add_with_statistics_takes(const void* x, const void* bias, const void* residual, DType dtype, ChannelView view);
cudaError_t add_with_statistics(void* sum, float* mean, float* var, const void* x, const void* bias,
                                const void* residual, DType dtype, ChannelView view, RunningStatistics running,
                                void* workspace, unsigned* counters, cudaStream_t stream);
// out = relu(bn(x)) with any mean and variance: the batch's own, running ones, or those merged over processes.
cudaError_t bn_relu_forward(void* out, const void* x, DType dtype, ChannelView view, BatchNorm<float> norm,
                            cudaStream_t stream);
// dz = dout where bn(x) > 0: sum_dz (the gradient of bias) and sum_dz_xhat (that of weight).
cudaError_t bn_relu_backward_reduce(float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x, DType dtype,
                                    ChannelView view, BatchNorm<float> norm, void* workspace, unsigned* counters,
                                    cudaStream_t stream);
// dx with batch statistics over `count` values a channel, plus `residual` (the gradient that reaches x by another path,
// or null). sum_dz null: the statistics were given, dx = scale * dz. Sums already divided by the count go with count
// = 1. x may be in pieces where it is channels_last and 16-bit, and there is no residual.
cudaError_t bn_relu_backward_apply(void* dx, const void* dout, Rows x, const float* sum_dz, const float* sum_dz_xhat,
                                   const void* residual, double count, DType dtype, ChannelView view,
                                   BatchNorm<float> norm, cudaStream_t stream);
// The sum of each channel over a channels_last x, not empty, in x's dtype; scratch as for the reductions above.
cudaError_t channel_sums(void* sums, const void* x, DType dtype, ChannelView view, void* workspace, unsigned* counters,
                         cudaStream_t stream);
size_t bn_relu_workspace_bytes(ChannelView view);  // of those that reduce
size_t bn_relu_counters(ChannelView view);         // how many words; also enough for the resident variant

// Resident variant, channels_last: one kernel each way, which reads every tensor once and keeps it in shared memory. A
// group of blocks shares a slab of channels: a cluster (sm_90 and up), or blocks of a cooperative launch.
struct Device {
  int sm_count;
  size_t shared_bytes;  // a block may have: cudaDevAttrMaxSharedMemoryPerBlockOptin
  int max_cluster;      // 1: no clusters; 8: portable; 16 where cudaOccupancyMaxActiveClusters agrees
};
struct ResidentPlan {
  int group = 0;          // blocks a slab; 0: does not fit
  int slab_bytes = 0;     // of a row
  bool clusters = false;  // else cooperative
};
// `tensors`: how many are held, 1 forward (x), 2 backward (x and dout). All tensors must lie on 16 bytes.
ResidentPlan bn_relu_resident_plan(ChannelView view, DType dtype, const Device& device, int tensors);
bool bn_relu_resident_fits(ChannelView view, DType dtype, const Device& device, int tensors);
size_t bn_relu_resident_workspace_bytes(ChannelView view, DType dtype, const ResidentPlan& plan);

// out, mean and biased var of the batch; weight and bias may be null. cudaErrorInvalidValue for a plan that does not
// fit.
cudaError_t bn_relu_resident_forward(void* out, float* mean, float* var, const void* x, const float* weight,
                                     const float* bias, DType dtype, ChannelView view, double eps,
                                     RunningStatistics running, const ResidentPlan& plan, void* workspace,
                                     unsigned* counters, cudaStream_t stream);
// dx (with `residual` added, or null), sum_dz and sum_dz_xhat; norm holds the forward pass's mean and var.
cudaError_t bn_relu_resident_backward(void* dx, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x,
                                      const void* residual, DType dtype, ChannelView view, BatchNorm<float> norm,
                                      const ResidentPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace ran::cuda
