#include "measuring.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "common/measured.h"

namespace ran {
namespace {

constexpr std::array kDTypeNames{"float32", "float64", "bfloat16", "float16"};  // in the order of DType

// As Python has them: device, threads, pass, dtype, sizes; and microseconds by path.
using Shape = std::tuple<int64_t, int64_t, std::string, std::string, std::array<int64_t, 11>>;
using Row = std::tuple<Shape, std::map<std::string, double>>;

template <typename Names>
int index_of(const Names& names, const std::string& name) {
  const auto it = std::find(names.begin(), names.end(), name);
  if (it == names.end()) throw std::invalid_argument("measurements: there is no " + name);
  return int(it - names.begin());
}

PassShape from_python(const Shape& shape) {
  const auto& [device, threads, pass, dtype, sizes] = shape;
  return {device, threads, Pass(index_of(kPassNames, pass)), DType(index_of(kDTypeNames, dtype)), sizes};
}

// Tuples all through: Python keeps shapes in dictionaries.
py::tuple to_python(const PassShape& shape) {
  return py::make_tuple(shape.device, shape.threads, kPassNames[int(shape.pass)], kDTypeNames[int(shape.dtype)],
                        py::tuple(py::cast(shape.sizes)));
}

std::vector<Measurement> measurements(const std::vector<Row>& rows) {
  std::vector<Measurement> found;
  for (const auto& [shape, times] : rows) {
    found.push_back({from_python(shape), {}});
    for (const auto& [path, us] : times) found.back().times[index_of(kPathNames, path)] = us;
  }
  return found;
}

std::vector<std::string> names_of(Paths paths) {
  std::vector<std::string> found;
  for (int i = 0; i < int(kPathNames.size()); ++i)
    if (paths.has(Path(i))) found.emplace_back(kPathNames[i]);
  return found;
}

// Python's functions live as long as the process: threads may ask for them while it ends.
void set_measuring_from_python(py::function load_, py::function tune_) {
  const auto *load = new py::function(std::move(load_)), *tune = new py::function(std::move(tune_));
  set_measuring(
      [load](int64_t device) {
        const py::gil_scoped_acquire gil;
        (*load)(device);
      },
      [tune](const PassShape& shape, Paths allowed, Path rule) {
        const py::gil_scoped_acquire gil;
        (*tune)(to_python(shape), names_of(allowed), kPathNames[int(rule)]);
      });
}

std::vector<std::tuple<py::tuple, std::vector<std::string>, std::string>> recorded() {
  std::vector<std::tuple<py::tuple, std::vector<std::string>, std::string>> found;
  for (const Asking& asking : recorded_shapes())
    found.emplace_back(to_python(asking.shape), names_of(asking.allowed), kPathNames[int(asking.rule)]);
  return found;
}

}  // namespace

void bind_measuring(py::module_& m) {
  m.def("set_measured", [](int64_t device, const std::vector<Row>& tuned, const std::vector<Row>& shipped) {
    set_measured(device, measurements(tuned), measurements(shipped));
  });
  m.def("set_measuring", &set_measuring_from_python);
  m.def("try_path", [](const std::optional<std::string>& path) {
    try_path(path ? std::optional(Path(index_of(kPathNames, *path))) : std::nullopt);
  });
  m.def("chosen_path", [](const Shape& shape, const std::vector<std::string>& allowed, const std::string& rule) {
    Paths paths;
    for (const std::string& path : allowed) paths.add(Path(index_of(kPathNames, path)));
    return kPathNames[int(choose_measured(from_python(shape), paths, Path(index_of(kPathNames, rule))).path)];
  });
  m.def("record_shapes", &record_shapes);
  m.def("recorded_shapes", &recorded);
}

}  // namespace ran
