"""csrc/cuda_dispatch.cpp, on a host without a GPU: what a row of ran_ext/dispatch.json decides."""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from _build import native

CHOICES = """
#include <cstdlib>
#include <stdexcept>
#include "cuda_dispatch.h"

int failed = 0;
#define EXPECT(what) (what) ? void() : void(failed = __LINE__)

int main() {
  using namespace ran;
  const auto bn_relu = [](bool backward, int64_t rows, DType dtype = DType::bf16, int arch = 90) {
    return choose_bn_relu(backward, {rows, 128, 1}, dtype, arch);
  };
  EXPECT(bn_relu(false, 4096).fused && bn_relu(true, 4096).fused);  // nothing was measured
  set_measured({{90, DType::bf16, "bn_relu", 32768, 128, 128, 9.0, 8.0},
                {90, DType::bf16, "bn_relu", 4000, 128, 128, 5.0, 6.0},
                {90, DType::bf16, "bn_relu_backward", 4096, 128, 128, 7.5, 3.0},
                {90, DType::bf16, "dgrad", 4096, 128, 128, 2.0, 3.0}});
  EXPECT(bn_relu(false, 4096).fused);
  EXPECT(bn_relu(false, 4096).why == "measured at 4000 pixels: resident 5.0 us, streaming 6.0 us");
  EXPECT(!bn_relu(false, 30000).fused && !bn_relu(true, 4096).fused);
  EXPECT(bn_relu(true, 4096, DType::f16).fused && bn_relu(true, 4096, DType::bf16, 80).fused);  // of others, nothing
  const cuda::Conv1x1Shape conv{1, 64, 64, 128, 128, 1};
  EXPECT(choose_conv1x1(ConvPass::dgrad, conv, DType::bf16, 90).fused);
  EXPECT(!choose_conv1x1(ConvPass::wgrad, conv, DType::bf16, 90).fused);
  setenv("RAN_EXT_BN_RELU", "resident", 1);
  EXPECT(bn_relu(true, 4096).fused);
  setenv("RAN_EXT_BN_RELU", "streaming", 1);
  EXPECT(!bn_relu(false, 4096).fused && bn_relu(false, 4096).why == "RAN_EXT_BN_RELU=streaming");
  try {
    set_measured({{90, DType::bf16, "sideways", 1, 1, 1, 1.0, 1.0}});
    EXPECT(false);
  } catch (const std::invalid_argument&) {
  }
  return failed;
}
"""


@pytest.mark.skipif(
    shutil.which("g++") is None or native.find_toolkit() is None, reason="needs g++ and the headers of a CUDA toolkit"
)
def test_the_nearest_measurement_decides(tmp_path, monkeypatch):
    for name in ("RAN_EXT_BN_RELU", "RAN_EXT_CONV1X1"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "choices.cpp").write_text(CHOICES)
    csrc, program = native.CSRC, tmp_path / "choices"
    include = [f"-iquote{csrc}", f"-I{native.find_toolkit() / 'include'}"]
    include += [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    sources: list[Path] = [tmp_path / "choices.cpp", csrc / "cuda_dispatch.cpp"]
    command = ["g++", "-std=c++20", "-DRAN_WITH_CUDA", *include, *sources, *libraries, "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, "-o", program], check=True)
    ran = subprocess.run([program])
    assert ran.returncode == 0, CHOICES.splitlines()[ran.returncode - 1]
