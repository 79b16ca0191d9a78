// The user's choice for 3x3 convolutions on the CPU (ran_ext.set_conv3x3), and what a pass runs on under it.
#pragma once

#include <string>

#include "torch_glue.h"

namespace ran {

// "fast", "strict" or "library", for all threads; raises for any other.
void set_conv3x3_mode(const std::string& mode);

cpu::Conv3x3 choose_conv3x3(ConvPass pass, DType dtype, const cpu::ConvShape& shape);

}  // namespace ran
