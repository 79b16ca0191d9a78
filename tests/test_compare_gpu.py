"""tests/emulation/compare_gpu.py: the GPU's half links, and faults are found.

That the emulation agrees with itself, the GPU suite's rehearsal shows: scripts/gpu_suite.py.
"""

import os
import shutil

import numpy as np
import pytest

from _build import native
from tests.emulation import build, compare_gpu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST")


def case(values: list[float], dtype: str = "float32", exact: bool = False, kernels: str = "a_kernel"):
    data = np.array(values, compare_gpu.DTYPES[dtype][0]).tobytes()
    return compare_gpu.Case("case", [compare_gpu.Output("out", dtype, exact, 0.01, data)], [kernels])


@pytest.mark.skipif(
    not (ARCHS and (native.OBJECTS / "cuda").exists()),
    reason="no CUDA kernels: .ci/link_cuda has them",
)
def test_the_half_for_a_gpu_is_linked_with_what_setup_compiled(tmp_path):
    compiled = {path: path.stat().st_mtime for path in native.OBJECTS.glob("cuda/*.o")}
    assert len(compiled) == len(build.kernels())
    program = compare_gpu.build_for_gpu(tmp_path, ARCHS, objects=native.OBJECTS)
    assert program.stat().st_mode & 0o100
    assert {path: path.stat().st_mtime for path in compiled} == compiled  # none again


def test_what_agrees():
    for dtype in ("float32", "bfloat16", "float16"):
        assert compare_gpu.judge(case([1, 2], dtype, exact=True), case([1, 2], dtype, exact=True), False).faults == []
    rounded = compare_gpu.judge(case([1.005, np.nan]), case([1, np.nan]), False)
    assert rounded.faults == []
    assert 0.4 < rounded.worst < 0.6


def test_what_differs():
    def faults(got, want, all_bits=False):
        return compare_gpu.judge(got, want, all_bits).faults

    assert faults(case([1, 2]), case([1, 3], exact=True)) == ["out: 1 of 2 values differ"]
    assert faults(case([1, 2.001]), case([1, 2]), all_bits=True) == ["out: 1 of 2 values differ"]
    assert faults(case([1, 2.1]), case([1, 2]))[0].startswith("out: off by 10 times")
    assert "out: off by inf" in faults(case([1, np.nan]), case([1, 2]))[0]
    assert faults(case([1], kernels="b_kernel"), case([1])) == ["the device ran b_kernel"]
