"""csrc/common/measured.cpp: which path the measurements choose, on a host without a GPU."""

import shutil
import subprocess

import pytest

from _build import native

CHOICES = """
#include <string>
#include <thread>
#include "common/measured.h"

int failed = 0;
#define EXPECT(what) (what) ? void() : void(failed = failed ? failed : __LINE__)

using namespace ran;

PassShape at(int64_t n, Pass pass = Pass::bn_relu, DType dtype = DType::bf16, int64_t device = 0, int64_t threads = 0) {
  return {device, threads, pass, dtype, {n, 16, 16, 128, 128}};
}

Times us(std::initializer_list<std::pair<Path, double>> given) {
  Times times{};
  for (const auto& [path, time] : given) times[int(path)] = time;
  return times;
}

bool is(const Choice& choice, Path path, Source source) { return choice.path == path && choice.source == source; }

int main() {
  const Paths held{Path::resident, Path::streaming};
  const auto choose = [&](const PassShape& shape) { return choose_measured(shape, held, Path::resident); };
  // The rule, until something is loaded; that happens once for a device.
  int loads = 0;
  set_measuring([&](int64_t device) { loads += device == 0 ? 1 : 100; }, nullptr);
  EXPECT(is(choose(at(16)), Path::resident, Source::rule));
  EXPECT(is(choose(at(16)), Path::resident, Source::rule));
  EXPECT(loads == 1);
  EXPECT(is(choose_measured(at(16), {Path::library}, Path::library), Path::library, Source::only));
  // Shipped ones: the nearest number of pixels; the same dtype, pass, device and channels.
  set_measured(0, {}, {{at(128), us({{Path::resident, 9}, {Path::streaming, 8}})},
                       {at(16), us({{Path::resident, 5}, {Path::streaming, 6}})},
                       {at(16, Pass::bn_relu_backward), us({{Path::resident, 7.5}, {Path::streaming, 3}})}});
  EXPECT(is(choose(at(17)), Path::resident, Source::shipped));
  EXPECT(is(choose(at(100)), Path::streaming, Source::shipped));
  EXPECT(is(choose(at(16, Pass::bn_relu_backward)), Path::streaming, Source::shipped));
  EXPECT(is(choose(at(16, Pass::bn_relu_backward, DType::f16)), Path::resident, Source::rule));
  EXPECT(is(choose(at(16, Pass::bn_relu_backward, DType::bf16, kCpu, 1)), Path::resident, Source::rule));
  EXPECT(loads == 101);
  // Tuned ones: their own shape alone, and before the shipped ones.
  set_measured(0, {{at(100), us({{Path::resident, 1}, {Path::streaming, 2}})}},
               {{at(128), us({{Path::resident, 9}, {Path::streaming, 8}})}});
  EXPECT(is(choose(at(100)), Path::resident, Source::tuned));
  EXPECT(is(choose(at(101)), Path::streaming, Source::shipped));
  // The number of threads is part of a shape.
  const Times three = us({{Path::f4x4, 1}, {Path::f2x2, 2}, {Path::library, 3}});
  set_measured(kCpu, {{at(1, Pass::wgrad, DType::f32, kCpu, 2), three}}, {});
  const auto wgrad = [](Paths allowed, int64_t threads = 2) {
    return choose_measured(at(1, Pass::wgrad, DType::f32, kCpu, threads), allowed, Path::library);
  };
  EXPECT(is(wgrad({Path::library, Path::f2x2, Path::f4x4}), Path::f4x4, Source::tuned));
  EXPECT(is(wgrad({Path::library, Path::f2x2, Path::f4x4}, 1), Path::library, Source::rule));
  // What is not allowed is not taken, however fast it is; what was not measured neither.
  EXPECT(is(wgrad({Path::library, Path::f2x2}), Path::f2x2, Source::tuned));
  EXPECT(is(wgrad({Path::library}), Path::library, Source::only));
  EXPECT(is(wgrad({Path::library, Path::product}), Path::library, Source::tuned));
  // What the rule takes stays where another path is faster by no more than noise.
  set_measured(1, {{at(1, Pass::gate, DType::f16, 1), us({{Path::product, 100}, {Path::library, 102}})},
                   {at(2, Pass::gate, DType::f16, 1), us({{Path::product, 100}, {Path::library, 104}})}},
               {});
  for (const int64_t n : {1, 2}) {
    const auto both = choose_measured(at(n, Pass::gate, DType::f16, 1), {Path::library, Path::product}, Path::library);
    EXPECT(is(both, n == 1 ? Path::library : Path::product, Source::tuned));
  }
  // A path is tried by one thread, where it is allowed.
  try_path(Path::f2x2);
  EXPECT(is(wgrad({Path::library, Path::f2x2, Path::f4x4}), Path::f2x2, Source::tried));
  EXPECT(is(wgrad({Path::library, Path::f4x4}), Path::f4x4, Source::tuned));
  std::thread([&] { EXPECT(is(wgrad({Path::library, Path::f4x4}), Path::f4x4, Source::tuned)); }).join();
  try_path(std::nullopt);
  // An unknown shape is tuned where it is met, once, if that is asked for, whatever comes of it.
  int tuned = 0;
  set_measuring(nullptr, [&](const PassShape& shape, Paths allowed, Path rule) {
    ++tuned;
    EXPECT(shape == at(55, Pass::gate) && allowed.has(Path::product) && rule == Path::library);
    set_measured(0, {{shape, us({{Path::library, 2}, {Path::product, 1}})}, {at(7), {}}}, {});
  });
  const auto meet = [&](const PassShape& shape, bool now) {
    return choose_measured(shape, {Path::library, Path::product}, Path::library, now);
  };
  EXPECT(is(meet(at(55, Pass::gate), false), Path::library, Source::rule));
  EXPECT(is(meet(at(55, Pass::gate), true), Path::product, Source::tuned));
  EXPECT(is(meet(at(55, Pass::gate), true), Path::product, Source::tuned));
  EXPECT(is(meet(at(7), true), Path::library, Source::rule));
  EXPECT(tuned == 1);
  // Recorded: each shape once, and only where there is a choice.
  record_shapes(true);
  choose(at(3));
  choose(at(3));
  wgrad({Path::library});
  meet(at(77), true);
  record_shapes(false);
  choose(at(4));
  EXPECT(recorded_shapes().size() == 2 && tuned == 1);
  return failed;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_measurements_choose(tmp_path):
    (tmp_path / "choices.cpp").write_text(CHOICES)
    program = tmp_path / "choices"
    sources = [tmp_path / "choices.cpp", native.CSRC / "common" / "measured.cpp"]
    command = ["g++", "-std=c++20", "-pthread", f"-iquote{native.CSRC}", *sources, "-o", program]
    subprocess.run(command, check=True)
    ran = subprocess.run([program])
    assert ran.returncode == 0, CHOICES.splitlines()[ran.returncode - 1]
