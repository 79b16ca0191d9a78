#ifdef RAN_WITH_CUDA

#include "cuda_dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace ran {
namespace {

using cuda::Conv1x1Pass;
using cuda::Conv1x1Shape;

// A class of shapes for which the fused kernel was measured to be faster than the library.
struct Faster {
  int arch;
  DType dtype;
  Conv1x1Pass pass;
  int64_t least_rows, most_rows;  // output pixels
  int64_t most_c_in, most_c_out;
  bool takes(Conv1x1Pass p, const Conv1x1Shape& s, DType d, int a) const {
    return a == arch && d == dtype && p == pass && s.rows() >= least_rows && s.rows() <= most_rows &&
           s.c_in <= most_c_in && s.c_out <= most_c_out;
  }
};

// Empty: nothing has been measured yet. benchmarks/ compares the two by RAN_EXT_CONV1X1.
const std::vector<Faster> kMeasured = {};

bool measured_faster(Conv1x1Pass pass, const Conv1x1Shape& shape, DType dtype, int arch) {
  for (const Faster& entry : kMeasured)
    if (entry.takes(pass, shape, dtype, arch)) return true;
  return false;
}

}  // namespace

bool use_fused_conv1x1(Conv1x1Pass pass, const Conv1x1Shape& shape, DType dtype, int arch) {
  const char* set = std::getenv("RAN_EXT_CONV1X1");
  const std::string_view choice = set && *set ? set : "auto";
  if (choice == "fused") return true;
  if (choice == "library") return false;
  if (choice == "auto") return measured_faster(pass, shape, dtype, arch);
  throw std::invalid_argument("bn_relu_conv2d: RAN_EXT_CONV1X1 must be auto, fused or library, got '" +
                              std::string(choice) + "'");
}

}  // namespace ran

#endif
