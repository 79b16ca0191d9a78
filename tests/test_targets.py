"""Targets beside measured figures, and the time model: both against results made by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.cases import op_cases
from benchmarks.targets import TARGETS, check, table
from benchmarks.time_model import Constants, main, unit_seconds, units

ROOT = Path(__file__).resolve().parent.parent
UNITS = ["16x16 1x1", "16x16 3x3", "8x8 1x1", "8x8 3x3", "4x4 1x1", "4x4 3x3", "2x2 1x1"]


def row(case, contender, value, task="forward + backward", dtype="bfloat16", percent=None):
    names = {"suite": "ops", "case": case, "task": task, "dtype": dtype, "contender": contender}
    return names | {"value": value, "percent": percent}


def measured(figures, name):
    return next(found["measured"] for found in check(figures) if found["target"] == name)


def test_nothing_is_met_where_nothing_was_measured():
    rows = check({"environment": {}, "ops-128-bfloat16": {"rows": []}})
    assert len(rows) == len(TARGETS)
    assert all(found["measured"] is None and found["met"] is None for found in rows)
    assert table(rows).count("not measured") == len(TARGETS)


def test_gates_take_the_worse_of_the_two_cases():
    rows = []
    for scale, ours, percent in ((1, 1.0, 93.0), (2, 0.8, 91.0)):
        case = f"attention_gate 4096x128x16x16 scale {scale}"
        rows += [row(case, "eager channels_last", 2.4), row(case, "torch.compile", 0.9, percent=[90.0, "copy"])]
        rows += [row(case, "ran_ext", ours, percent=[percent, "copy"])]
        rows += [row(case, "ran_ext, CUDA graph", 1.1, percent=[50.0, "copy"])]
    figures = {"bandwidth": {"rows": rows}}
    assert measured(figures, "attention gate, 256 MB tensors: of the copy bandwidth") == 91
    assert measured(figures, "attention gate against eager") == pytest.approx(2.4)
    assert measured(figures, "attention gate against compile") == pytest.approx(0.9)


def test_bn_relu_is_a_geometric_mean_over_seven_shapes_against_torchs_faster_dtype():
    ops, halves = [], []
    for index, unit in enumerate(UNITS):
        shape, kernel = unit.split()
        ops.append(row(f"bn_relu_conv2d 128x{index // 2}x{shape} {kernel} 8-8", "ran_ext", 1.0))
        norm = f"bn_relu 128x{index // 2}x{shape}"
        ops += [row(norm, "ran_ext, CUDA graph", 1.0), row(norm, "eager, CUDA graph", 5.0)]
        halves.append(row(norm, "eager, CUDA graph", 4.0 if index else 1.0, dtype="float16"))
    name = "BN-ReLU, 7 shapes, against torch in its faster dtype"
    assert measured({"ops-128-bfloat16": {"rows": ops}}, name) is None  # float16 was not measured
    found = measured({"ops-128-bfloat16": {"rows": ops}, "ops-128-float16": {"rows": halves}}, name)
    assert found == pytest.approx(4.0 ** (5 / 7))  # the first shape counts twice
    assert measured({"ops-128-bfloat16": {"rows": ops}}, "BN-ReLU, 7 shapes, against cuDNN's graph") is None


def test_the_sum_is_of_the_networks_seven_convolutions():
    names = [case.name for case in op_cases(128) if case.flops(False)]  # what compare.py adds up
    assert len(names) == 7
    assert all(name.startswith("bn_relu_conv2d") for name in names)


def test_a_contender_without_a_value_is_not_a_figure():
    case = "bn_relu_conv2d, sum of 7 shapes, batch 128"
    rows = [row(case, "ran_ext", 1.0), row(case, "max-autotune, CUDA graph", None)]
    name = "BN-ReLU-conv, sum, batch 128, against max-autotune"
    assert measured({"ops": {"rows": rows}}, name) is None
    rows[1]["value"] = 1.5
    assert measured({"ops": {"rows": rows}}, name) == 1.5


def test_the_sanitizer_counts_when_all_four_tools_have_run():
    figures = {f"sanitizer-{tool}": {"errors": 0} for tool in ("memcheck", "racecheck", "initcheck")}
    assert measured(figures, "compute-sanitizer, four tools") is None
    figures["sanitizer-synccheck"] = {"errors": 2}
    assert measured(figures, "compute-sanitizer, four tools") == 2


def test_a_rehearsed_record_is_no_record():
    rows = [
        {"accuracy": 0.9, "seconds": 10, "epoch_seconds": 0.7},
        {"accuracy": 0.88, "seconds": 14, "epoch_seconds": 0.9},
    ]
    settings = {"rehearsal": None, "recipe": {"batch_size": 128}}
    figures = {"record-time": {"rows": rows, "settings": settings}}
    assert measured(figures, "its seconds") == 12
    accuracy = next(found for found in check(figures) if "accuracy in the record" in found["target"])
    assert accuracy["measured"] == pytest.approx(0.89)
    assert accuracy["met"] is False
    assert measured(figures, "epoch of ran_compact, batch 128") == pytest.approx(0.8)
    settings["rehearsal"] = "REHEARSAL"
    assert measured(figures, "its seconds") is None


def test_the_model_predicts_what_the_plan_was_made_with():
    sums = {}
    for batch in (128, 1024):
        for unit in units(batch):
            for name, value in unit_seconds(unit, Constants()).items():
                sums[name, batch] = sums.get((name, batch), 0) + 1e6 * value
    expected = {"eager": (368, 1913), "compile": (305, 1704), "one-kernel BN": (228, 1578)}
    expected |= {"fused, mma": (261, 1648), "fused, wgmma": (232, 1410)}
    for name, values in expected.items():
        assert [sums[name, batch] for batch in (128, 1024)] == pytest.approx(values, abs=0.6)


def constants_file(folder, unit, **passes):
    content = {"launch": 2e-6, "copy": {"4": 1e12, "64": 2e12}, "matmul": {"bfloat16": 400e12}}
    path = folder / "constants.json"
    path.write_text(json.dumps(content | {"units": [{"unit": unit, "dtype": "bfloat16", **passes}]}))
    return path


def test_measured_constants_take_the_place_of_the_assumed(tmp_path, capsys):
    unit = units(128)[0]
    path = constants_file(tmp_path, unit.name, forward=100e-6)
    constants = Constants.read(path, "bfloat16")
    moved = 2 * (64 << 20)
    assert constants.seconds(1, moved) == pytest.approx(moved / 2e12)  # a copy is predicted as it was measured
    with_forward = unit_seconds(unit, constants)["one-kernel BN"]
    without = unit_seconds(unit, Constants(2e-6, constants.bandwidth, 400e12))["one-kernel BN"]
    assert 80e-6 < with_forward - without < 100e-6
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert f"launch 2.00 us (measured, {path})" in out
    assert f"batch norm: measured, {path}" in out  # batch 128
    assert "batch norm: assumed" in out  # batch 1024
    assert main([str(path), "--dtype", "float16"]) == 1
    assert "must hold constants for float16, has bfloat16" in capsys.readouterr().err
    assert main([]) == 0
    assert "measured" not in capsys.readouterr().out
