// What the two ops between a resolution and its half check and build alike.
#pragma once

#include "../common/tensors.h"

namespace ran {

inline void check_pyramid(const char* op, const char* name, const Tensor& t) {
  RAN_CHECK_VALUE(t.dim() == 4 && t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0, op, name,
                  " must be (N, C, H, W), with nothing but N 0, got ", t.sizes());
}

// `height` and `width` are the high resolution's; n and c are t's.
inline GateShape pyramid_shape(const Tensor& t, int64_t height, int64_t width, at::MemoryFormat format) {
  return {t.size(0), t.size(1), height, width, 2, format == at::MemoryFormat::ChannelsLast};
}

inline void check_low(const char* op, const char* name, const Tensor& t, const GateShape& shape) {
  RAN_CHECK_VALUE(t.size(2) == shape.mask_h() && t.size(3) == shape.mask_w(), op, name, " must be ", shape.mask_h(),
                  "x", shape.mask_w(), " for a size of ", shape.h, "x", shape.w, " (halved, rounded up), got ",
                  t.sizes());
}

inline Tensor empty_at(const Tensor& t, int64_t height, int64_t width, at::MemoryFormat format) {
  return at::empty({t.size(0), t.size(1), height, width}, t.options().memory_format(format));
}

}  // namespace ran
