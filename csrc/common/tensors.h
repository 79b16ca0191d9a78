// What every op's torch side needs: checks that name the op and the values, dtypes and layouts.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>

#include "types.h"

// The C++ checks keep a kernel from reading out of bounds whoever calls it; the Python functions in ran_ext/ops check
// first, for every backend and with the public names.
#define RAN_CHECK_VALUE(condition, op, ...) TORCH_CHECK_VALUE(condition, op, ": ", __VA_ARGS__)
#define RAN_CHECK_TYPE(condition, op, ...) TORCH_CHECK_TYPE(condition, op, ": ", __VA_ARGS__)

namespace ran {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline bool present(const OptTensor& t) { return t.has_value() && t->defined(); }

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      RAN_CHECK_TYPE(false, op, name, " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

// float, or double for double data: what sums and per-channel vectors are held in.
inline at::ScalarType acc_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// `t` itself where it is dense NCHW or channels_last, else a copy in the one of the two that its strides suggest.
inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous() || t.is_contiguous(at::MemoryFormat::ChannelsLast)) return t;
  return t.contiguous(t.suggest_memory_format());
}

// A dense 4-d tensor's format. Where both hold (one channel, or one pixel) the memory is the same either way.
inline at::MemoryFormat format_of(const Tensor& dense_x) {
  return dense_x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

inline ChannelView view_of(const Tensor& dense_x) {
  const int64_t n = dense_x.size(0), c = dense_x.size(1), pixels = dense_x.size(2) * dense_x.size(3);
  if (format_of(dense_x) == at::MemoryFormat::Contiguous) return {n, c, pixels};
  return {n * pixels, c, 1};
}

// Raises unless `t` has these sizes and the dtype and device of `like`.
inline void check_as(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes, const Tensor& like) {
  RAN_CHECK_VALUE(t.sizes() == sizes, op, name, " must be ", sizes, ", got ", t.sizes());
  RAN_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, name, " must have dtype ", like.scalar_type(), ", got ",
                 t.scalar_type());
  RAN_CHECK_VALUE(t.device() == like.device(), op, name, " must be on ", like.device(), ", got ", t.device());
}

// A convolution's bias, where there is one, is a vector of the weight's rows, dtype and device.
inline void check_bias(const char* op, const OptTensor& bias, const Tensor& weight) {
  if (present(bias)) check_as(op, "bias", *bias, {weight.size(0)}, weight);
}

// A gate's up-sampling factor, no larger than its trunk: beyond that nothing changes, and products would overflow.
inline int64_t bounded_scale(int64_t scale, at::IntArrayRef trunk_sizes) {
  return trunk_sizes.size() == 4 ? std::min(scale, std::max({trunk_sizes[2], trunk_sizes[3], int64_t(1)})) : scale;
}

// float64 on a GPU has no kernels: those ops run decomposed.
inline bool has_kernels(const Tensor& x) { return !(x.is_cuda() && x.scalar_type() == at::kDouble); }

}  // namespace ran
