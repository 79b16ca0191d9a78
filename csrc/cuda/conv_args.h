// What the fused convolutions are given: of 1x1 and 3x3 kernels alike; the former alone take x in pieces. No torch
// here.
#pragma once

#include "kernels.h"

namespace ran::cuda {

// Mean and biased variance of the stored output (of the gate's where there is one), for the next batch normalisation.
struct ConvStatistics {
  float* mean = nullptr;  // null: no statistics
  float* var = nullptr;
  RunningStatistics running;
};

// y = conv(relu(bn(x))) + bias + residual, added in fp32 and rounded once.
template <typename Shape>
struct ConvForward {
  void* y;
  ConvStatistics statistics;
  Rows x;
  BatchNorm<float> norm;
  const void* weight;
  const void* bias;      // (c_out) of x's dtype, or null
  const void* residual;  // of y's shape, or null
  Shape shape;
  void* workspace;
  unsigned* counters = nullptr;
};

// dz = the gradient of relu(bn(x)) where z = bn(x) > 0, else 0; and the two sums over pixels that batch normalisation's
// backward takes (sum_dz is also the gradient of its bias, sum_dz_xhat that of its weight). Sums are over dz as stored.
template <typename Shape>
struct ConvDgrad {
  void* dz;            // of x's shape
  float* sum_dz;       // (c_in)
  float* sum_dz_xhat;  // (c_in)
  const void* dy;
  Rows x;
  BatchNorm<float> norm;
  const void* weight;
  Shape shape;
  void* workspace;
  unsigned* counters = nullptr;
};

// The weight's gradient, with relu(bn(x)) computed again from x; dbias = sum of dy over pixels.
template <typename Shape>
struct ConvWgrad {
  void* dweight;  // of the weight's shape
  void* dbias;    // (c_out) or null
  const void* dy;
  Rows x;
  BatchNorm<float> norm;
  Shape shape;
  void* workspace;
};

}  // namespace ran::cuda
