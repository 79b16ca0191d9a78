// The CPU kernels, compiled once for each instruction set; csrc/cpu_kernels.cpp picks a set at run time.
//
// Order of arguments: outputs, inputs, sizes, options. Vectors of one value a channel are float (double for f64 data). Every
// sum is taken over tiles of fixed size that are merged in fixed order: results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../types.h"

namespace ran::cpu {

// A channels_last 1x1 convolution of stride 1 as a matrix product: out (m, co) = relu(bn(x (m, ci))) * weight^T (co, ci).
struct Conv1x1Shape {
  int64_t m, ci, co;
};

struct Kernels {
  const char* name;

  void (*attention_gate_forward)(void* out, const void* trunk, const void* mask, DType, GateShape);
  void (*attention_gate_backward)(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask, DType,
                                  GateShape);

  // mean and biased variance of each channel; both (channels,)
  void (*batch_norm_stats)(void* mean, void* var, const void* x, DType, ChannelView);
  // out = relu(x * scale + shift)
  void (*bn_relu_forward)(void* out, const void* x, DType, ChannelView, BatchNorm<void>);
  // dz = dout where z > 0: sum_dz, and sum_dz_xhat = sum dz * (x - mean) / sqrt(var + eps)
  void (*bn_relu_backward_reduce)(void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType, ChannelView,
                                  BatchNorm<void>);
  // dx of normalisation with batch statistics over `count` values a channel; with sum_dz null (running statistics) dx =
  // scale * dz. dx may be dout.
  void (*bn_relu_backward_apply)(void* dx, const void* dout, const void* x, const void* sum_dz, const void* sum_dz_xhat,
                                 double count, DType, ChannelView, BatchNorm<void>);

  // Whether the two below take this shape; they may be null.
  bool (*conv1x1_supported)(DType, Conv1x1Shape);
  // out = relu(bn(x)) * weight^T + bias + residual; bias (float) and residual may be null
  void (*conv1x1_forward)(void* out, const void* x, const void* weight, const float* bias, const void* residual, DType,
                          Conv1x1Shape, BatchNorm<void>);
  // dz (m, ci) = dout * weight where z > 0, with its two sums; dweight (co, ci) and dbias (co, float; may be null)
  void (*conv1x1_backward)(void* dz, float* sum_dz, float* sum_dz_xhat, void* dweight, float* dbias, const void* dout,
                           const void* x, const void* weight, DType, Conv1x1Shape, BatchNorm<void>);
};

}  // namespace ran::cpu
