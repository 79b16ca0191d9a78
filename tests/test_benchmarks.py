"""The benchmarks: what they refuse to time, count and let pass, and a rehearsal of the commands."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    compare,
    converted,
    cudnn_graphs,
    inference,
    loss_curves,
    networks,
    peak_memory,
    scale,
    step_kernels,
    strided,
)
from benchmarks.agreement import admit, limits, verify
from benchmarks.cases import BNReLUConv, op_cases
from benchmarks.contenders import Subject, contenders, op_oracle, op_subject
from benchmarks.cudnn_graphs import offers
from benchmarks.memory import saved_bytes
from benchmarks.report import COLOURS, Row, read_json, regressions, tables, write_json
from benchmarks.timing import Spread, interleave, ratios
from ran_ext import _backend

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
CPU = torch.device("cpu")


needs_kernels = pytest.mark.skipif(bool(_backend.why_not_native("cpu")), reason="needs the compiled CPU kernels")


def test_rounds_interleave_and_rotate():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(functions, 3, CPU, warm_up=0)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order == list("abc" + "abc" + "bca" + "cab")  # one call each to count calls, then the rounds


def test_ratio_is_taken_within_each_round():
    found = ratios({"base": [1.0, 10.0, 100.0], "own": [0.5, 5.0, 50.0]}, "base")
    assert found["own"] == Spread(2.0, 2.0, 2.0)
    assert found["base"] == Spread(1.0, 1.0, 1.0)


@needs_kernels
@pytest.mark.parametrize("task", ["forward", "forward + backward"])
@pytest.mark.parametrize("index", range(len(op_cases(2))))
def test_contenders_of_ops_agree(index, task):
    case = op_cases(2)[index]
    for dtype in (torch.float32, torch.bfloat16):
        oracle = op_oracle(case, task, CPU)
        subjects = {row.name: op_subject(case, row, task, CPU) for row in contenders(dtype, CPU, False, task)}
        allowed = limits(subjects["eager channels_last"], dtype, oracle)
        for name, subject in subjects.items():
            verify(name, subject, allowed, oracle)


@pytest.mark.parametrize("wrong", [lambda x: 1.01 * x, torch.zeros_like, lambda x: x * float("nan")])
def test_wrong_results_are_not_timed(wrong):
    truth = (torch.randn(50).double(),)
    right = Subject(lambda: None, lambda: (truth[0].float(),))
    other = Subject(lambda: None, lambda: (wrong(truth[0].float()),))
    makers = {"baseline": lambda: right, "other": lambda: other, "right": lambda: right}
    subjects, why_not = admit(makers, torch.float32, truth)
    assert list(subjects) == ["baseline", "right"]
    assert "verify: other: results must differ" in why_not["other"]


def test_a_baseline_that_fails_is_an_error():
    def broken():
        raise OSError("out of order")

    with pytest.raises(OSError, match="out of order"):
        admit({"baseline": broken}, torch.float32, ())
    fine = Subject(lambda: None, lambda: (torch.ones(1),))
    assert admit({"baseline": lambda: fine, "b": broken}, torch.float32, (torch.ones(1),))[1] == {
        "b": "OSError: out of order"
    }


def test_cudnn_without_its_package_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    cudnn_graphs._library.cache_clear()
    case = next(case for case in op_cases(2) if cudnn_graphs.offers(case, "forward", torch.bfloat16))
    baseline = contenders(torch.bfloat16, CPU, False, "forward")[0]
    makers = {
        baseline.name: lambda: op_subject(case, baseline, "forward", CPU),
        cudnn_graphs.NAME: lambda: cudnn_graphs.subject(case, "forward", torch.bfloat16, CPU),
    }
    why_not = admit(makers, torch.bfloat16, op_oracle(case, "forward", CPU))[1]
    [(name, reason)], nan = why_not.items(), float("nan")
    row = Row("ops", case.name, "forward", "bfloat16", name, nan, "ms", {}, missing=reason)
    assert f"| {case.name} | cuDNN graph API | not available: ModuleNotFoundError" in tables([row])


def test_cudnn_is_offered_where_it_has_an_engine():
    for dtype, task, wanted in [
        (torch.bfloat16, "forward + backward", {"bn_relu": 4}),
        (torch.float16, "forward", {"bn_relu": 4, "bn_relu_conv2d": 7}),
        (torch.float32, "forward", {}),
    ]:
        ops = [case.name.split()[0] for case in op_cases(128) if offers(case, task, dtype)]
        assert {op: ops.count(op) for op in ops} == wanted


def test_missing_values_survive_the_file(tmp_path):
    row = Row("ops", "gate", "forward", "float32", "ran_ext", float("nan"), "ms", {}, missing="no kernels")
    write_json(tmp_path / "rows.json", {}, [row])
    assert "NaN" not in (tmp_path / "rows.json").read_text()
    assert read_json(tmp_path / "rows.json")[1][0].missing == "no kernels"


@needs_kernels
def test_saved_bytes_are_those_of_the_tensors_kept():
    case = BNReLUConv((2, 8, 4, 4), 4, 3)
    inputs = case.inputs(torch.float32, torch.channels_last, CPU)
    activation, vector = 2 * 8 * 4 * 4 * 4, 8 * 4
    ours = saved_bytes(lambda: case.ours(*inputs), inputs[1:])
    assert activation <= ours <= activation + 4 * vector
    assert saved_bytes(lambda: case.plain(*inputs), inputs[1:]) >= 2 * activation


def rows_of(median, unit="ms", contender="ran_ext"):
    spread = Spread(median, median - 0.01, median + 0.01)
    return [Row("ops", "gate", "forward", "float32", contender, 1.0, unit, {"eager channels_last": spread})]


@pytest.mark.parametrize(
    ("old", "new", "unit", "lines"),
    [(2.0, 1.95, "ms", 0), (2.0, 1.8, "ms", 1), (2.0, 3.0, "ms", 0), (0.5, 0.6, "MB", 1), (0.5, 0.4, "MB", 0)],
)
def test_gate_sees_a_worse_ratio(old, new, unit, lines):
    assert len(regressions(rows_of(new, unit), rows_of(old, unit), 0.05)) == lines


def test_gate_refuses_to_compare_nothing():
    with pytest.raises(ValueError, match="no ratio of ran_ext's is in both runs"):
        regressions(rows_of(2.0), rows_of(2.0, contender="torch.compile"), 0.05)


@needs_kernels
def test_compare_writes_what_it_prints_and_gates(tmp_path, capsys):
    out = tmp_path / "results" / "quick.json"
    common = ["--quick", "--suite", "memory", "--device", "cpu", "--dtype", "float32"]
    assert compare.main([*common, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    named = {"cpu", "cores", "threads", "torch", "ran_ext", "backend", "cpu_capability", "compiler", "date"}
    assert named <= set(content["environment"])
    assert len(content["environment"]["load_average_after"]) == 3
    for row in content["rows"]:
        assert f"| {row['contender']} | {row['value']:.4g} |" in printed
    assert (tmp_path / "results" / "quick_memory.png").read_bytes().startswith(b"\x89PNG")
    assert compare.main([*common, "--against", str(out)]) == 0
    for row in content["rows"]:
        for spread in row["ratios"].values():
            spread["median"] /= 2
    out.write_text(json.dumps(content))
    assert compare.main([*common, "--against", str(out)]) == 1
    assert "worse by more than 5%: memory, attention_gate 2x128x16x16 scale 1" in capsys.readouterr().out


@needs_kernels
@pytest.mark.parametrize(("suite", "least"), [("ops", 24), ("model", 9)])
def test_compare_times_ops_and_the_network(tmp_path, suite, least):
    out = tmp_path / "quick.json"
    options = ["--quick", "--rounds", "2", "--device", "cpu", "--dtype", "float32", "--suite", suite]
    assert compare.main([*options, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= least
    assert all(row["value"] > 0 for row in rows)
    assert {row["ratios"]["eager channels_last"]["median"] for row in rows if "eager c" in row["contender"]} == {1.0}
    assert out.with_name(f"quick_{suite}.png").stat().st_size > 10_000


@needs_kernels
def test_loss_curves_start_together(tmp_path):
    out = tmp_path / "curves.json"
    options = ["--images", "8", "--epochs", "1", "--batch", "4", "--device", "cpu"]
    assert loss_curves.main([*options, "--out", str(out)]) == 0
    losses = {name: curve["losses"] for name, curve in json.loads(out.read_text())["runs"].items()}
    assert [len(values) for values in losses.values()] == [2, 2, 2]
    first = [values[0] for values in losses.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert out.with_suffix(".png").stat().st_size > 10_000


@needs_kernels
def test_networks_are_timed_and_their_bytes_counted(tmp_path):
    out = tmp_path / "networks.json"
    options = ["--model", "alexnet_attention", "--batch", "2", "--pixels", "32", "--rounds", "1", "--no-compile"]
    networks.main([*options, "--out", str(out)])
    found = json.loads(out.read_text())
    row = dict(zip(found["columns"], found["rows"][0], strict=True))
    assert row["network"] == "alexnet_attention"
    assert row["compile, ms"] == row["over compile"] == ""
    assert row["ran_ext, ms"] > 0
    assert 0.2 < row["bytes kept, of eager's"] < 0.9


@needs_kernels
def test_compare_is_a_command():
    command = [sys.executable, "-m", "benchmarks.compare", "--against", "missing.json", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "--against: there is no file missing.json" in done.stderr


def test_suites_are_collected_and_a_missing_gpu_is_named():
    pytest.importorskip("pytest_benchmark")
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: the suites would run")
    files = [FOLDER / "bench_ops.py", FOLDER / "bench_model.py"]
    options = ["-q", "--benchmark-only", "-rs", "-k", "cuda and not cpu", "-p", "no:cacheprovider"]
    # Under xdist pytest-benchmark would turn itself off in the inner run too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a CUDA GPU" in done.stdout


def test_results_stay_small():
    """git keeps every version of them."""
    files = [path for path in (FOLDER / "results").rglob("*") if path.is_file()]
    texts = [path for path in files if path.suffix in (".json", ".csv", ".md")]
    assert sum(len(path.read_text().splitlines()) for path in texts) <= 3000
    assert sum(path.stat().st_size for path in files if path not in texts) <= 1.5e6


def test_every_contender_has_a_colour():
    assert cudnn_graphs.NAME in COLOURS
    for device in (CPU, torch.device("cuda")):
        for task in ("forward + backward", "training step", "inference"):
            assert {row.name for row in contenders(torch.float32, device, True, task)} <= set(COLOURS)


def test_folded_networks_beside_those_that_serve(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxscript")
    conv, last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    small = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), last, nn.Flatten())
    monkeypatch.setattr(inference, "NETWORKS", {"small": (lambda: small, 2, 8)})
    command = ["--network", "small", "--rounds", "1", "--no-compile", "--threads", "1"]
    inference.main([*command, "--out", str(tmp_path / "a")])
    [row] = json.loads((tmp_path / "a").read_text())["rows"]
    assert row[:4] == ["small", 2, 8, "float32"]
    assert row[-2] in (inference.EAGER, inference.ONNX, inference.OPENVINO)
    assert row[-1] > 0
    monkeypatch.setattr(inference, "TOLERANCE", {torch.float32: 0.0})
    with pytest.raises(SystemExit, match="is off by"):
        inference.main(command)


def test_scale_with_threads_batch_and_size(capsys):
    with torch.random.fork_rng():
        scale.main(["--threads", "1", "--batch", "1", "--pixels", "16", "--rounds", "1", "--dtype", "bfloat16"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 ")]
    assert [row.split(" | ")[2:4] for row in rows] == [["1", "32"], ["8", "16"]]


def test_a_convolution_of_stride_2_is_split_into_stride_1(tmp_path, monkeypatch):
    assert doctest.testmod(strided).failed == 0
    monkeypatch.setattr(strided, "SIZES", [(16, 32, 8)])
    strided.main(["--batch", "1", "--rounds", "1", "--out", str(tmp_path / "a")])
    [row] = json.loads((tmp_path / "a").read_text())["rows"]
    assert row[:3] == ["16", "32", "8"]
    assert row[-1] == pytest.approx(row[-2] * 36 / 25, rel=0.01)


def test_peak_memory_in_processes_of_their_own(tmp_path):
    peak_memory.main(["--batch", "2", "--pixels", "32", "--steps", "1", "--rounds", "1", "--out", str(tmp_path / "a")])
    rows = json.loads((tmp_path / "a").read_text())["rows"]
    assert [row[0] for row in rows] == list(peak_memory.KINDS)
    assert all(value > 0 for row in rows for value in row[3:-1])


@pytest.mark.usefixtures("native")
def test_the_kernels_of_passes_are_listed_by_path(tmp_path):
    out = tmp_path / "passes.json"
    assert step_kernels.main(["--device", "cpu", "--quick", "--passes", "--dtype", "float32", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["passes"]
    assert {"library", "product"} <= {row["path"] for row in rows}
    assert all(row["kernels"] and row["sum_us"] > 0 for row in rows)


def test_a_converted_network_beside_a_memory_budget(monkeypatch, capsys):
    block = lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))  # noqa: E731
    monkeypatch.setattr(converted, "NETWORKS", [("block", block, 2, 8)])
    monkeypatch.setattr(converted, "BUDGETS", (0.5,))
    converted.main(["--budget", "--rounds", "1", "--network", "block"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| block")]
    assert [row[3] for row in rows] == ["eager", "converted", "compiled, 0.5"]
    kept = [float(row[-1].strip(" |")) for row in rows]
    assert kept[0] == 1
    assert max(kept[1:]) < 1
    with pytest.raises(SystemExit, match="--network nothing: not among those here"):
        converted.main(["--network", "nothing"])
