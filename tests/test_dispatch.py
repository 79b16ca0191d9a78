"""csrc/common/measured.cpp: what a row of ran_ext/dispatch.json decides, on a host without a GPU."""

import shutil
import subprocess

import pytest

from _build import native

CHOICES = """
#include <cstdlib>
#include <stdexcept>
#include "common/measured.h"

int failed = 0;
#define EXPECT(what) (what) ? void() : void(failed = __LINE__)

int main() {
  using namespace ran;
  const TwoPaths paths{"RAN_EXT_BN_RELU", "resident", "streaming"}, conv_paths{"RAN_EXT_CONV1X1", "fused", "library"};
  const auto pass = [](const char* name, int64_t rows, DType dtype = DType::bf16, int arch = 90) {
    return Measured{arch, dtype, name, rows, 128, 128};
  };
  EXPECT(decide(pass("bn_relu", 4096), paths) == Decision::unmeasured);
  EXPECT(describe(pass("bn_relu", 4096), paths).empty());
  set_measured({{90, DType::bf16, "bn_relu", 32768, 128, 128, 9.0, 8.0},
                {90, DType::bf16, "bn_relu", 4000, 128, 128, 5.0, 6.0},
                {90, DType::bf16, "bn_relu_backward", 4096, 128, 128, 7.5, 3.0},
                {90, DType::bf16, "dgrad", 4096, 128, 128, 2.0, 3.0}});
  EXPECT(decide(pass("bn_relu", 4096), paths) == Decision::fused_faster);
  EXPECT(describe(pass("bn_relu", 4096), paths) == "measured at 4000 pixels: resident 5.0 us, streaming 6.0 us");
  EXPECT(decide(pass("bn_relu", 30000), paths) == Decision::other_faster);
  EXPECT(decide(pass("bn_relu_backward", 4096), paths) == Decision::other_faster);
  EXPECT(decide(pass("bn_relu_backward", 4096, DType::f16), paths) == Decision::unmeasured);
  EXPECT(decide(pass("bn_relu_backward", 4096, DType::bf16, 80), paths) == Decision::unmeasured);
  EXPECT(decide(pass("dgrad", 4096), conv_paths) == Decision::fused_faster);
  EXPECT(decide(pass("wgrad", 4096), conv_paths) == Decision::unmeasured);
  setenv("RAN_EXT_BN_RELU", "resident", 1);
  EXPECT(decide(pass("bn_relu_backward", 4096), paths) == Decision::fused_asked);
  setenv("RAN_EXT_BN_RELU", "streaming", 1);
  EXPECT(decide(pass("bn_relu", 4096), paths) == Decision::other_asked);
  EXPECT(describe(pass("bn_relu", 4096), paths) == "RAN_EXT_BN_RELU=streaming");
  setenv("RAN_EXT_BN_RELU", "fast", 1);
  try {
    decide(pass("bn_relu", 4096), paths);
    EXPECT(false);
  } catch (const std::invalid_argument&) {
  }
  try {
    set_measured({{90, DType::bf16, "sideways", 1, 1, 1, 1.0, 1.0}});
    EXPECT(false);
  } catch (const std::invalid_argument&) {
  }
  return failed;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_nearest_measurement_decides(tmp_path, monkeypatch):
    for name in ("RAN_EXT_BN_RELU", "RAN_EXT_CONV1X1"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "choices.cpp").write_text(CHOICES)
    program = tmp_path / "choices"
    sources = [tmp_path / "choices.cpp", native.CSRC / "common" / "measured.cpp"]
    subprocess.run(["g++", "-std=c++17", f"-iquote{native.CSRC}", *sources, "-o", program], check=True)
    ran = subprocess.run([program])
    assert ran.returncode == 0, CHOICES.splitlines()[ran.returncode - 1]
