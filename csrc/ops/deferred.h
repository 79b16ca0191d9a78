// A tensor of Python's that is not written out yet, as autograd sees it.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

namespace ran {

// Makes `out` the result of an operation on `inputs`, whose derivative is `backward(dout)`: a gradient or None for
// each.
void set_deferred_history(const at::Tensor& out, const std::vector<std::optional<at::Tensor>>& inputs,
                          const py::object& backward);

}  // namespace ran
