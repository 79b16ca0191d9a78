// The list of native functions: what Python calls directly, and the ops that torch knows.
#include <torch/csrc/utils/pybind.h>

#include "torch_glue.h"

namespace {

// What this module was built for; ran_ext/_built_for.py says the same without loading it.
py::dict build_info() {
  py::dict info;
  info["torch"] = RAN_TORCH_VERSION;
#ifdef RAN_WITH_CUDA
  info["cuda"] = RAN_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["cpu_kernels"] = ran::cpu_kernels().name;  // the instruction set that runs here
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
