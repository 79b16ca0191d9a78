// Measured times of the paths that a pass can take, and the choice by them: those that ran_ext.tune took on this
// machine, else those that come with the package (ran_ext/dispatch.json), else a rule on paper. No torch here.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

namespace ran {

// Of a convolution: the library's, with BN-ReLU in a pass of its own; ours as a matrix product, or by Winograd. Of a
// convolution and the gate behind it: apart (library) or in one kernel (product). Of BN-ReLU: the kernel that holds a
// tensor in shared memory, or those that stream it.
enum class Path { library, product, f2x2, f4x4, resident, streaming };
inline constexpr std::array kPathNames{"library", "product", "f2x2", "f4x4", "resident", "streaming"};

// A set of paths.
class Paths {
 public:
  Paths() = default;
  Paths(std::initializer_list<Path> paths) {
    for (const Path path : paths) add(path);
  }
  void add(Path path) { bits_ |= 1u << int(path); }
  bool has(Path path) const { return bits_ >> int(path) & 1; }
  bool one_at_most() const { return (bits_ & (bits_ - 1)) == 0; }

 private:
  unsigned bits_ = 0;
};

// The first four in the order of ConvPass. conv2d: with no BN-ReLU before it.
enum class Pass { forward, dgrad, wgrad, gate, conv2d_forward, conv2d_dgrad, conv2d_wgrad, bn_relu, bn_relu_backward };
inline constexpr std::array kPassNames{"forward",      "dgrad",          "wgrad",
                                       "gate",         "conv2d_forward", "conv2d_dgrad",
                                       "conv2d_wgrad", "bn_relu",        "bn_relu_backward"};

// A pass at a shape: what a measurement is of.
struct PassShape {
  int64_t device;   // a GPU's index, or kCpu
  int64_t threads;  // of the CPU; 0 on a GPU
  Pass pass;
  DType dtype;
  // x's (n, h, w, channels), channels of the output, kernel, stride, padding. Of a gate, x is what its convolution
  // takes, and the stride the gate's scale; of BN-ReLU all from the kernel on are 0.
  std::array<int64_t, 11> sizes;

  bool operator==(const PassShape&) const = default;
};
constexpr int64_t kCpu = -1;

using Times = std::array<double, kPathNames.size()>;  // microseconds by Path; 0: not measured
struct Measurement {
  PassShape shape;
  Times times;
};

// Replaces the tables of a device. `tuned` ones speak for their shape alone; of `shipped` ones that are the same but
// for n, h and w, the one of the nearest number of pixels speaks.
void set_measured(int64_t device, const std::vector<Measurement>& tuned, const std::vector<Measurement>& shipped);

// `load` is called at the first choice on a device, and is to call set_measured; `tune` where `tunes_now` was said of a
// shape that was not tuned.
using Tune = std::function<void(const PassShape&, Paths, Path rule)>;
void set_measuring(std::function<void(int64_t device)> load, Tune tune);

// From where a choice comes: there is no other path; the user; a measurement; a rule on paper; or a path is being
// tried.
enum class Source { only, asked, tuned, shipped, rule, tried };
inline constexpr std::array kSourceNames{"", "asked for", "tuned here", "shipped measurement", "by rule", "tried"};

struct Choice {
  Path path;
  Source source;
};
// The fastest of `allowed` by measurement (the rule's, where it is as fast), or what the rule says; of the path that
// this thread tries, where it is allowed.
Choice choose_measured(const PassShape& shape, Paths allowed, Path rule, bool tunes_now = false);

// From now on this thread's choices fall on `path` wherever it is allowed; nothing ends that.
void try_path(std::optional<Path> path);

// What choose_measured was asked for while recording, on any thread, where there was a choice: each shape once.
struct Asking {
  PassShape shape;
  Paths allowed;
  Path rule;
};
void record_shapes(bool on);
std::vector<Asking> recorded_shapes();

}  // namespace ran
