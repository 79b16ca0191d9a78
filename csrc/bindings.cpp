// The list of native functions: what Python calls directly, and the ops that torch knows.
#include <torch/csrc/utils/pybind.h>

#include "common/kernels.h"
#include "conv/choose.h"
#include "measuring.h"
#include "ops/bn_act.h"
#include "ops/deferred.h"
#ifdef RAN_WITH_CUDA
#include "batch_norm/cuda.h"
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
  info["cpu_kernels"] = ran::cpu_kernels(at::kBFloat16).name;  // the instruction set that runs here
  return info;
}

std::string name_of(ran::Source source) { return ran::kSourceNames[int(source)]; }

// What a pass runs on: whether that is a fused kernel, why, and from where the choice comes; for ran_ext.explain.
using Explained = std::tuple<bool, std::string, std::string>;

// `with_norm`: with BN-ReLU before it.
std::vector<Explained> explain_conv(const at::Tensor& x_, const at::Tensor& weight, std::vector<int64_t> stride,
                                    std::vector<int64_t> padding, int64_t paths, bool with_norm) {
  constexpr const char* kOp = "explain_conv";
  const ran::Convolution conv{stride, padding, ran::asked_of(kOp, paths)};
  ran::check_convolution(kOp, x_, weight, conv);
  const at::Tensor x = ran::dense(x_);
  std::vector<Explained> passes;
  for (const auto pass : {ran::ConvPass::forward, ran::ConvPass::dgrad, ran::ConvPass::wgrad}) {
    const ran::ConvChoice choice =
        with_norm ? ran::choose_conv(pass, x, weight, conv) : ran::choose_plain_conv(pass, x, weight, conv);
    passes.emplace_back(ran::is_fused(choice), ran::describe(choice, pass, x, weight, conv), name_of(choice.source));
  }
  return passes;
}

// Of a 1x1 convolution and the gate behind it: whether one kernel does both.
Explained explain_conv_gate(const at::Tensor& trunk_, const at::Tensor& x_, const at::Tensor& weight, int64_t scale,
                            int64_t paths) {
  const at::Tensor trunk = ran::dense(trunk_), x = ran::dense(x_);
  const ran::ConvChoice choice =
      ran::choose_conv_gate(trunk, x, weight, scale, ran::asked_of("explain_conv_gate", paths));
  const std::string why = ran::describe(choice, ran::ConvPass::gate, x, weight, {{1, 1}, {0, 0}});
  return {ran::is_fused(choice), why, name_of(choice.source)};
}

#ifdef RAN_WITH_CUDA

// Forward and backward of BN-ReLU: whether one kernel holds x (and its gradient) in shared memory.
std::vector<Explained> explain_bn_relu(const at::Tensor& x_, int64_t paths) {
  const at::Tensor x = ran::dense(x_);
  const c10::DeviceGuard guard(x.device());
  std::vector<Explained> passes;
  for (const bool backward : {false, true}) {
    const ran::BnReluChoice choice = ran::choose_bn_relu(x, backward, ran::asked_of("explain_bn_relu", paths).bn_relu);
    passes.emplace_back(choice.path == ran::BnReluPath::resident, ran::describe(choice), name_of(choice.source));
  }
  return passes;
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("explain_conv", &explain_conv);
  m.def("explain_conv_gate", &explain_conv_gate);
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("bn_act_recomputed", &ran::bn_act_recomputed, no_gil);
  m.def("bn_act_conv2d", &ran::bn_act_conv2d, no_gil);
  m.def("set_deferred_history", &ran::set_deferred_history);
  ran::bind_measuring(m);
#ifdef RAN_WITH_CUDA
  m.def("explain_bn_relu", &explain_bn_relu);
#endif
}
