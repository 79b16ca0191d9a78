"""tests/ptx: what is translated and what stops it, budgets of layout, and the protocols between blocks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from _build import native
from tests.ptx import layout, operands, programs, protocols, run, translate
from tests.ptx.exploration import Broken

ROOT = Path(__file__).resolve().parent.parent
HEAD = """.version 9.0
.target sm_90a
.address_size 64
.shared .align 4 .b8 table[20];
.extern .shared .align 16 .b8 dynamic[];
.entry _Z8a_kernelPf(
	.param .u64 _Z8a_kernelPf_param_0
)
{
	.reg .f32 	%f<4>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<3>;
"""


def kernel_of(body: str, folder: Path) -> translate.Kernel:
    path = folder / "a.ptx"
    path.write_text(f"{HEAD}{body}\n\tret;\n}}\n")
    return translate.read(path)[0]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_a_kernel_becomes_a_function(tmp_path):
    body = "ld.param.u64 %rd1, [_Z8a_kernelPf_param_0];\n mov.u32 %r1, table;\n mov.u32 %r2, dynamic;\n"
    body += "ld.shared.f32 %f1, [%r1+4];\n fma.rn.f32 %f2, %f1, 0f40000000, %f1;\n st.global.f32 [%rd1], %f2;"
    kernel = kernel_of(body, tmp_path)
    text = "\n".join(kernel.body)
    assert (kernel.short_name, kernel.static_bytes) == ("a_kernel", 32)
    assert "r1 = (uint32_t)0u;" in text
    assert "r2 = (uint32_t)32u;" in text  # dynamic memory lies behind the static, on 16 bytes
    assert "f2 = __builtin_fmaf(f1, __builtin_bit_cast(float, 0x40000000u), f1);" in text
    assert len(kernel.places) == 2
    other = kernel_of(body.replace("40000000", "40800000"), tmp_path)
    assert other.function != kernel.function


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
@pytest.mark.parametrize(
    "unknown",
    [
        "fma.rn.ftz.f32 %f1, %f2, %f2, %f2",
        "add.sat.s32 %r1, %r2, %r2",
        "wgmma.fence.sync.aligned",
        "ld.global.f32 %f1, [%rx1]",
        "bar.sync 1",
        "mov.u32 %r1, %smid",
    ],
)
def test_what_is_not_known_stops_the_translation(unknown, tmp_path):
    with pytest.raises(operands.UnknownInstruction, match=r"a\.ptx: a_kernel: " + re.escape(unknown)):
        kernel_of(f"{unknown};", tmp_path)


NUMBERS = """
#include <cstdio>
#include "instructions.h"
int main() {
  bool ok = ptx::quotient<uint32_t>(7, 0) == ~0u && ptx::quotient<int32_t>(-7, 2) == -3;
  ok &= ptx::shift_left<uint32_t>(1, 32) == 0 && ptx::shift_right<int32_t>(-8, 40) == -1;
  ok &= ptx::shift_right<uint64_t>(1ull << 40, 40) == 1;
  ok &= ptx::saturate(__builtin_nanf("")) == 0 && ptx::saturate(2) == 1 && ptx::saturate(0.25f) == 0.25f;
  ok &= ptx::relu(-1) == 0 && ptx::relu(__builtin_nanf("")) != ptx::relu(__builtin_nanf(""));
  ok &= ptx::divide_roughly(1, 0x1p127f) == 0 && ptx::divide_roughly(3, 2) == 1.5f;
  ok &= ptx::truncate(-2.75f) == -2 && ptx::truncate(3e9f) == INT32_MAX && ptx::truncate(-3e9f) == INT32_MIN;
  ok &= ptx::truncate(__builtin_nanf("")) == 0;
  ok &= ptx::from_bf16(0x3fc0) == 1.5f;
  return !ok;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_numbers_are_those_of_ptx(tmp_path):
    (tmp_path / "numbers.cpp").write_text(NUMBERS)
    command = ["g++", "-std=c++20", f"-I{programs.HERE}", tmp_path / "numbers.cpp", "-o", tmp_path / "numbers"]
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "numbers"]).returncode == 0


def test_layout_is_held_to_its_budget():
    found = layout.read("k | 0 | shared load | 4 | 32 | 8 | 0\nk | 1 | global store | 4 | 8 | 8 | 3\n")
    assert found["k"].figures() == {"wavefronts": 4.0, "sectors": 1.0, "narrow": 3}
    budget = {"wavefronts": 2.0, "sectors": 1.0, "narrow": 3}
    assert list(layout.faults(found, {"k": budget, "gone": budget})) == [
        "k: wavefronts 4.0, and its budget is 2.0",
        "k: wavefronts 4.0, and its budget does not say why",
        "k: narrow 3, and its budget does not say why",
        "gone: has a budget and was not run; --update drops it",
    ]
    explained = {**budget, "wavefronts": 4.0, "why": "a test"}
    assert list(layout.faults(found, {"k": explained})) == []


def test_results_and_budgets_are_of_the_kernels_that_are_shipped():
    instances = set(json.loads((ROOT / "csrc" / "cuda" / "budgets.json").read_text())["sm_90a"])
    assert set(re.findall(r"^- `(.*)`$", (programs.HERE / "results.md").read_text(), re.MULTILINE)) == instances
    budgets = layout.budgets()
    assert set(budgets) <= instances
    assert {name.split("<")[0] for name in budgets} == {name.split("<")[0] for name in instances}
    over = {name for name, b in budgets.items() if max(b["wavefronts"], b["sectors"]) > layout.LEAST or b["narrow"]}
    assert over == {name for name, b in budgets.items() if b.get("why")}


def test_what_has_not_changed_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layout, "BUDGETS", tmp_path / "layout.json")
    monkeypatch.setattr(programs.native, "find_toolkit", lambda: Path("toolkit"))
    monkeypatch.setattr(run.check_cuda, "digest", lambda nvcc: f"{nvcc}")
    monkeypatch.setattr(run.programs, "compile_ptx", lambda *a, **k: pytest.fail("compiled"))
    layout.update({}, run.digest(Path("toolkit/bin/nvcc")))
    monkeypatch.setattr(sys, "argv", ["run", "--changed"])
    assert run.main() == 0
    assert "neither a kernel nor nvcc nor a test has changed" in capsys.readouterr().out
    assert layout.budgets() == {}
    (tmp_path / "other_test.cpp").write_text("")
    for name, value in {"check_cuda.digest": lambda nvcc: "another nvcc", "programs.HERE": tmp_path}.items():
        with monkeypatch.context() as changed:
            changed.setattr(f"tests.ptx.run.{name}", value)
            with pytest.raises(pytest.fail.Exception, match="compiled"):
                run.main()


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_protocol_keeps_its_promise_and_needs_every_step(name):
    protocol, steps = protocols.PROTOCOLS[name]
    assert protocol() > 50
    for step in steps:
        with pytest.raises(Broken):
            protocol(left_out=step)


def test_a_grid_may_meet_twice():
    assert protocols.grid(blocks=3, threads=1, rounds=2) > 1000


LIMITS = """
#include <thread>
#include <vector>
#include "shared_limit.h"
static int device = 0, calls = 0, last[2] = {};
extern "C" cudaError_t cudaGetDevice(int* d) { *d = device; return cudaSuccess; }
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  ++calls;
  last[device] = bytes;
  return bytes > 200000 ? cudaErrorInvalidValue : cudaSuccess;
}
int main() {
  const void* kernel = &calls;
  bool ok = ran::allow_shared_bytes(kernel, 48 << 10) == cudaSuccess && calls == 0;
  ok &= ran::allow_shared_bytes(kernel, 100000) == cudaSuccess && last[0] == 100000;
  ok &= ran::allow_shared_bytes(kernel, 60000) == cudaSuccess && calls == 1 && last[0] == 100000;  // never lowered
  ok &= ran::allow_shared_bytes(kernel, 300000) != cudaSuccess;                                     // and not noted
  ok &= ran::allow_shared_bytes(kernel, 150000) == cudaSuccess && last[0] == 150000;
  device = 1;
  ok &= ran::allow_shared_bytes(kernel, 60000) == cudaSuccess && last[1] == 60000;
  device = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([=] { for (int n = 0; n < 1000; ++n) ran::allow_shared_bytes(kernel, 50000 + 100 * n); });
  for (auto& thread : threads) thread.join();
  ok &= last[0] == 150000 && calls == 4;  // all of them had asked for less
  return !ok;
}
"""


@pytest.mark.skipif(programs.native.find_toolkit() is None, reason="needs the headers of a CUDA toolkit")
def test_a_kernels_memory_limit_is_never_lowered(tmp_path):
    (tmp_path / "limits.cpp").write_text(LIMITS)
    include = [f"-iquote{ROOT / 'csrc' / 'cuda'}", f"-I{programs.native.find_toolkit() / 'include'}"]
    subprocess.run(
        ["g++", "-std=c++17", "-pthread", *include, tmp_path / "limits.cpp", "-o", tmp_path / "limits"], check=True
    )
    assert subprocess.run([tmp_path / "limits"]).returncode == 0


def test_no_memory_of_torch_outlives_a_launch():
    """A tensor in a static variable lies in whatever pool was current when it was made, also in a CUDA graph's."""
    for path in (ROOT / "csrc").glob("*cuda*.*"):
        held = re.findall(r"\bstatic\b[^;(]*\b(?:Tensor|Buffer|TensorOptions)\b[^;]*;", path.read_text())
        assert not held, f"{path.name}: {held}"


def test_ptx_that_is_not_there_says_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "find_toolkit", lambda: tmp_path)
    with pytest.raises(native.BuildFailure, match=r"no .*attention_gate\.compute_80\.ptx: .*check_cuda --build"):
        programs.compile_ptx("sm_80", tmp_path, names=["attention_gate"], made=tmp_path / "cuda")
