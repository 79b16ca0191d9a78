// The list of native functions: what Python calls directly, and the ops that torch knows.
#include <torch/csrc/utils/pybind.h>

#include "common/kernels.h"
#include "conv/choose.h"
#include "ops/deferred.h"
#ifdef RAN_WITH_CUDA
#include "batch_norm/cuda.h"
#include "common/measured.h"
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

// What a pass runs on: whether that is a fused kernel, and why; for ran_ext.explain.
using Explained = std::pair<bool, std::string>;

std::vector<Explained> explain_conv(const at::Tensor& x_, const at::Tensor& weight, std::vector<int64_t> stride,
                                    std::vector<int64_t> padding, int64_t conv3x3) {
  constexpr const char* kOp = "explain_conv";
  const ran::Convolution conv{stride, padding, ran::conv3x3_mode(kOp, conv3x3)};
  ran::check_convolution(kOp, x_, weight, conv);
  const at::Tensor x = ran::dense(x_);
  std::vector<Explained> passes;
  for (const auto pass : {ran::ConvPass::forward, ran::ConvPass::dgrad, ran::ConvPass::wgrad}) {
    const ran::ConvPath path = ran::choose_conv(pass, x, weight, conv);
    passes.emplace_back(ran::is_fused(path), ran::describe(path, pass, x, weight, conv));
  }
  return passes;
}

// Of a 1x1 convolution and the gate behind it: whether one kernel does both.
Explained explain_conv_gate(const at::Tensor& trunk_, const at::Tensor& x_, const at::Tensor& weight, int64_t scale) {
  const at::Tensor trunk = ran::dense(trunk_), x = ran::dense(x_);
  const ran::ConvPath path = ran::choose_conv_gate(trunk, x, weight, scale);
  return {ran::is_fused(path), ran::describe(path, ran::ConvPass::gate, x, weight, {{1, 1}, {0, 0}})};
}

#ifdef RAN_WITH_CUDA

// Forward and backward of BN-ReLU: whether one kernel holds x (and its gradient) in shared memory.
std::vector<Explained> explain_bn_relu(const at::Tensor& x_) {
  const at::Tensor x = ran::dense(x_);
  const c10::DeviceGuard guard(x.device());
  std::vector<Explained> passes;
  for (const bool backward : {false, true}) {
    const ran::BnReluPath path = ran::choose_bn_relu(x, backward);
    passes.emplace_back(path == ran::BnReluPath::resident, ran::describe(path, x, backward));
  }
  return passes;
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
  m.def("explain_conv", &explain_conv);
  m.def("explain_conv_gate", &explain_conv_gate);
  m.def("set_deferred_history", &ran::set_deferred_history);
#ifdef RAN_WITH_CUDA
  m.def("explain_bn_relu", &explain_bn_relu);
  m.def("set_dispatch_table", &set_dispatch_table);
#endif
}
