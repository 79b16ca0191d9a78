// What Python calls to hand down measurements, to take new ones, and to try a path.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace ran {

void bind_measuring(py::module_& m);

}  // namespace ran
