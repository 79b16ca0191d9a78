"""scripts/check_cuda.py: what it reads from the tools' output, and when it finds fault."""

import shutil
from pathlib import Path

import pytest

from scripts import check_cuda as check

ROOT = Path(__file__).resolve().parent.parent

PTXAS = """ptxas info    : Compiling entry function '_ZN3ran4cuda4gateIfLi4EEEvPfl' for 'sm_80'
ptxas info    : Function properties for _ZN3ran4cuda4gateIfLi4EEEvPfl
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0], 1024 bytes smem
ptxas info    : Compile time = 5.1 ms
"""
SASS = """
Fatbin elf code:
================
arch = sm_80
	code for sm_80
		Function : plain_kernel
        /*0010*/              @!P2 LDG.E.128.CONSTANT R14, [R14.64] ;     /* 0x0000000a0e0ea981 */
        /*0020*/                   STL [R1], R16 ;                        /* 0x0000000a10107981 */
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_holds_kernels_to_their_budget():
    usages = check.parse_ptxas(PTXAS)
    assert usages == [check.Usage("gate<float, 4>", "sm_80", 40, 1024, 12)]
    budgets = {"sm_80": {"gate<float, 4>": {"registers": 39, "shared": 1024}, "gone": {"registers": 1, "shared": 0}}}
    faults = list(check.budget_faults(usages, budgets, whole=True))
    assert [fault.split(": ")[1] for fault in faults] == [
        "12 bytes of spills; none are allowed",
        "40 registers, and its budget is 39",
        "has a budget, but no kernel; --update drops it",
    ]
    assert "has no budget" in " ".join(check.budget_faults(usages, {}, whole=False))


def test_reads_machine_code(monkeypatch):
    monkeypatch.setattr(check.native, "run", lambda command: SASS)
    monkeypatch.setattr(check, "demangle", list)
    held = check.read_sass("cuobjdump", Path("x.o"))
    assert held == {("plain_kernel", "sm_80"): {"LDG.E.128.CONSTANT": 1, "STL": 1}}
    faults = list(check.sass_faults(held, {"plain": ["LDG.E.128", "HMMA"], "other": []}))
    assert faults == [
        "sm_80 plain_kernel: touches local memory (STL)",
        "sm_80 plain_kernel: holds no HMMA",
        "sass pattern 'other' of budgets.json matches no kernel",
    ]


def test_budgets_are_written_as_they_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "BUDGETS", tmp_path / "budgets.json")
    usages = [check.Usage("b", "sm_90a", 32, 0, 0), check.Usage("a", "sm_80", 40, 1024, 0)]
    held = {("a", "sm_80"): check.Counter({"LDG.E": 3, "STG.E.128": 2, "NOP": 7})}
    check.write_budgets(usages, {"a": ["HMMA"]}, held)
    budgets = check.json.loads(check.BUDGETS.read_text())
    assert budgets == {
        "sm_80": {"a": {"registers": 40, "shared": 1024, "instructions": 5, "narrow": 3}},
        "sm_90a": {"b": {"registers": 32, "shared": 0}},
        "digest": "",
        "sass": {"a": ["HMMA"]},
    }
    assert list(check.budget_faults(usages, budgets, True, held)) == []
    held["a", "sm_80"]["STG.E.U16"] += 1
    assert [fault.split(": ")[1] for fault in check.budget_faults(usages, budgets, True, held)] == [
        "6 instructions, and its budget is 5",
        "4 narrow, and its budget is 3",
    ]


def test_a_kernel_with_dynamic_shared_memory_has_none_beside_it():
    """What a plan counts is what a launch takes; 16 static bytes would make it fail at sizes that just fit."""
    budgets = check.json.loads(check.BUDGETS.read_text())
    dynamic = [
        (kernel, chip[kernel]["shared"])
        for arch, chip in budgets.items()
        if arch not in check.NO_CHIPS
        for kernel in chip
        if check.re.match(r"resident_|(forward|dgrad|wgrad)(3x3)?_kernel<", kernel)
    ]
    assert len(dynamic) >= 4 * 34
    assert all(static == 0 for _, static in dynamic)


def test_only_unchanged_sources_are_spared_chips(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setattr(check.native, "CSRC", tmp_path)
    monkeypatch.setattr(check.native, "nvcc_version", lambda nvcc: "13.0")
    texts = {"common/types.h": "one", "cuda/a.cu": '#include "../common/types.h"\n'}
    for name, text in {**texts, "common/tensors.h": "one", "cuda/layout.json": "one"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    nvcc = Path("nvcc")
    assert check.chips(True, nvcc) == check.ARCHS  # nothing is known yet
    check.write_budgets([check.Usage("a", "sm_80", 40, 0, 0)], {}, {}, check.digest(nvcc))
    for name in ("cuda/layout.json", "common/tensors.h"):  # no kernel is made of these
        (tmp_path / name).write_text("two")
    assert check.chips(True, nvcc) == check.ALWAYS
    assert check.chips(False, nvcc) == check.chips(True, None) == check.ARCHS
    monkeypatch.setattr(check.native, "nvcc_version", lambda nvcc: "13.1")
    assert check.chips(True, nvcc) == check.ARCHS
    monkeypatch.setattr(check.native, "nvcc_version", lambda nvcc: "13.0")
    for name, text in texts.items():
        assert check.chips(True, nvcc) == check.ALWAYS
        (tmp_path / name).write_text(f"{text}two")
        assert check.chips(True, nvcc) == check.ARCHS
        (tmp_path / name).write_text(text)
