#include "convolution.h"

#include <limits>

namespace ran {

cpu::ConvShape Convolution::shape(const Tensor& x, const Tensor& weight) const {
  return {x.size(0),
          x.size(2),
          x.size(3),
          x.size(1),
          out_size(x, weight, 0),
          out_size(x, weight, 1),
          weight.size(0),
          weight.size(2),
          weight.size(3),
          stride[0],
          stride[1],
          padding[0],
          padding[1]};
}

void check_convolution(const char* op, const Tensor& x, const Tensor& weight, const Convolution& conv) {
  RAN_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) > 0 && weight.size(3) > 0, op,
                  "weight must be (C_out, ", x.size(1), ", kH, kW), got ", weight.sizes());
  RAN_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, "weight must have x's dtype ", x.scalar_type(), ", got ",
                 weight.scalar_type());
  RAN_CHECK_VALUE(weight.device() == x.device(), op, "weight must be on x's device ", x.device(), ", got ",
                  weight.device());
  // Below 2^31 no sum or product of sizes overflows.
  const auto check_pair = [op](const char* name, at::IntArrayRef pair, int64_t least) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const bool fits = pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kMost;
    RAN_CHECK_VALUE(fits, op, name, " must be a pair, each from ", least, " to 2**31 - 1, got ", pair);
  };
  check_pair("stride", conv.stride, 1);
  check_pair("padding", conv.padding, 0);
  for (const int i : {0, 1})
    RAN_CHECK_VALUE(x.size(2 + i) + 2 * conv.padding[i] >= weight.size(2 + i), op, "x ", x.sizes(), " with padding ",
                    conv.padding, " is smaller than the kernel of weight ", weight.sizes());
}

}  // namespace ran
