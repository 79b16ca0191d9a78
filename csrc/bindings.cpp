// The list of native functions: what Python calls directly, and the ops that torch knows.
#include <torch/csrc/utils/pybind.h>

#include "conv_paths.h"
#include "deferred.h"
#ifdef RAN_WITH_CUDA
#include "cuda_bn_relu.h"
#include "cuda_dispatch.h"
#endif

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

// Forward, dgrad and wgrad of a convolution: whether each takes a fused kernel, and why.
std::vector<std::pair<bool, std::string>> conv_ways(const at::Tensor& x, const at::Tensor& weight,
                                                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                    int64_t conv3x3) {
  const ran::Convolution conv{stride, padding, ran::conv3x3_mode("conv_ways", conv3x3)};
  ran::check_convolution("conv_ways", x, weight, conv);
  std::vector<std::pair<bool, std::string>> ways;
  for (const auto pass : {ran::ConvPass::forward, ran::ConvPass::dgrad, ran::ConvPass::wgrad}) {
    const ran::ConvWay way = ran::conv_way(pass, ran::dense(x), weight, conv);
    ways.emplace_back(way.fused, way.why);
  }
  return ways;
}

// Whether one kernel takes a 1x1 convolution and the gate behind it, and why.
std::pair<bool, std::string> conv_gate_way(const at::Tensor& trunk, const at::Tensor& x, const at::Tensor& weight,
                                           int64_t scale) {
  const ran::ConvWay way = ran::conv_gate_way(ran::dense(trunk), ran::dense(x), weight, scale);
  return {way.fused, way.why};
}

#ifdef RAN_WITH_CUDA

// Forward and backward of BN-ReLU: whether one kernel holds x (and its gradient) in shared memory, and why not.
std::vector<std::pair<bool, std::string>> bn_relu_ways(const at::Tensor& x) {
  std::vector<std::pair<bool, std::string>> ways;
  const c10::DeviceGuard guard(x.device());
  for (const int tensors : {1, 2}) {
    std::string why;
    const bool fits = ran::resident_plan(ran::dense(x), tensors, &why).group > 0;
    ways.emplace_back(fits, why);
  }
  return ways;
}

using Entry = std::tuple<int, std::string, std::string, int64_t, int64_t, int64_t, double, double>;

// arch, dtype, pass, rows, c_in, c_out, fused_us, library_us.
void set_dispatch_table(const std::vector<Entry>& entries) {
  std::vector<ran::Measured> table;
  for (const auto& [arch, dtype, pass, rows, c_in, c_out, fused, library] : entries)
    table.push_back(
        {arch, dtype == "bfloat16" ? ran::DType::bf16 : ran::DType::f16, pass, rows, c_in, c_out, fused, library});
  ran::set_measured(std::move(table));
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("conv_ways", &conv_ways);
  m.def("conv_gate_way", &conv_gate_way);
  m.def("set_deferred_history", &ran::set_deferred_history);
#ifdef RAN_WITH_CUDA
  m.def("bn_relu_ways", &bn_relu_ways);
  m.def("set_dispatch_table", &set_dispatch_table);
#endif
}
