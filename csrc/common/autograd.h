// What the ops' derivatives share. Backward runs a fused op; where its result must itself be differentiable (double
// backward), it runs decomposed into ATen's, which autograd differentiates.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "tensors.h"

// What follows registers an op's kernels, once for each device that has them:  RAN_KERNELS(m) { m.impl("op", op); }
#ifdef RAN_WITH_CUDA
#define RAN_KERNELS(m) RAN_NAMED_KERNELS(m, C10_CONCATENATE(register_kernels_, C10_UID))
#define RAN_NAMED_KERNELS(m, name)                  \
  static void name(torch::Library&);                \
  TORCH_LIBRARY_IMPL(ran_ext, CPU, m) { name(m); }  \
  TORCH_LIBRARY_IMPL(ran_ext, CUDA, m) { name(m); } \
  static void name(torch::Library& m)
#else
#define RAN_KERNELS(m) TORCH_LIBRARY_IMPL(ran_ext, CPU, m)
#endif

namespace ran {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Looks up one of this library's ops.
template <typename Signature>
inline auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// Running statistics on their way through autograd, which differentiates nothing in them.
struct Kept {
  at::TensorList tensors;
  std::optional<double> momentum;

  // The ops below autograd change them; autograd notices where they were saved for a backward pass.
  void mark_changed() const {
    for (const Tensor& t : tensors)
      if (!t.is_inference()) torch::autograd::impl::bump_version(t);
  }
};

// The gradients of `compute(inputs)` in `inputs`, differentiable; undefined where an input is absent or needs none. In
// each with the others held: one may have been made of another, as the input of a layer whose weight an earlier layer
// shares.
template <typename Compute>
variable_list differentiate(const Compute& compute, const variable_list& inputs, const Tensor& dout) {
  const auto takes_gradient = [](const Tensor& t) { return t.defined() && t.requires_grad(); };
  variable_list held, wanted, result;
  for (const Tensor& input : inputs) {
    held.push_back(takes_gradient(input) ? input.view_as(input) : input);
    if (takes_gradient(input)) wanted.push_back(held.back());
  }
  variable_list found = torch::autograd::grad({compute(held)}, wanted, {dout}, /*retain_graph=*/true,
                                              /*create_graph=*/true, /*allow_unused=*/true);
  auto next = found.begin();
  for (const Tensor& input : inputs) result.push_back(takes_gradient(input) ? *next++ : Tensor());
  return result;
}

}  // namespace ran
