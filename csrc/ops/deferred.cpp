// Autograd's side of a value that is not written out: ran_ext/_deferred.py has the value's.
#include "deferred.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace ran {
namespace {

using torch::autograd::variable_list;

// Reached by whoever uses the tensor without asking for its value, such as an autograd.Function of the user's. Most
// tensors never are, and so the node must cost little: one in Python takes ten times as long to make.
struct DeferredBackward : torch::autograd::Node {
  explicit DeferredBackward(const py::object& backward)
      : backward_(std::in_place, py::object(backward).release().ptr(), getPyInterpreter()) {}

  std::string name() const override { return "DeferredBackward"; }

  void release_variables() override { backward_.reset(); }

  variable_list apply(variable_list&& grads) override {
    variable_list result(num_outputs());
    if (!grads[0].defined()) return result;
    TORCH_CHECK(backward_,
                "Trying to backward through the graph a second time, which was freed after the first: "
                "specify retain_graph=True");
    const py::gil_scoped_acquire gil;
    try {
      const auto backward = py::reinterpret_borrow<py::object>(backward_->ptr(getPyInterpreter()));
      const auto found = backward(grads[0]).cast<std::vector<std::optional<at::Tensor>>>();
      for (size_t i = 0; i < result.size(); ++i) result[i] = found.at(i).value_or(at::Tensor());
    } catch (py::error_already_set& error) {
      error.restore();
      python_error kept;
      kept.persist();
      throw kept;  // autograd's engine raises it where backward was called
    }
    return result;
  }

 private:
  std::optional<c10::SafePyObject> backward_;
};

// What holds a node changed from one torch to the next.
template <typename Node>
auto make_node(const py::object& backward) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>)
    return c10::make_intrusive<Node>(backward);
  else
    return std::make_shared<Node>(backward);
}

}  // namespace

void set_deferred_history(const at::Tensor& out, const std::vector<std::optional<at::Tensor>>& inputs,
                          const py::object& backward) {
  variable_list given;
  for (const auto& input : inputs) given.push_back(input.value_or(at::Tensor()));
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(given)) return;
  const auto node = make_node<DeferredBackward>(backward);
  node->set_next_edges(torch::autograd::collect_next_edges(given));
  torch::autograd::set_history(out, node);
}

}  // namespace ran
