"""ran_ext.tune: measured paths are right, are taken, are kept, and a file of them that is no good does no harm."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import ran_ext
from ran_ext import _backend, _candidates, _explain, _measured, _tune
from ran_ext.__main__ import main
from ran_ext._measured import CPU
from ran_ext.nn import BNReLUConv2d

pytestmark = pytest.mark.usefixtures("native", "forgotten")

SIZES = (8, 16, 16, 32, 32, 3, 3, 1, 1, 1, 1)


@pytest.fixture
def forgotten(tmp_path, monkeypatch):
    """A cache folder of the test's own; what it tuned is forgotten at its end."""
    monkeypatch.setattr(_measured, "file", FILE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_measured, "_said", set())
    forget()
    yield
    monkeypatch.undo()
    forget()


FILE = _measured.file  # before conftest's takes its place


def forget() -> None:
    """As in a process that begins."""
    _measured._tuned.clear()
    if _backend._C is not None:
        _measured.load(CPU)


def shape_of(name: str = "forward", dtype: str = "float32", sizes: tuple[int, ...] = SIZES) -> _measured.Shape:
    return CPU, torch.get_num_threads(), name, dtype, sizes


def layer(kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(BNReLUConv2d(32, 32, kernel, padding=kernel // 2, bias=False))


def images() -> torch.Tensor:
    return torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last)


def paths(dtype: torch.dtype = torch.float32) -> dict[str, tuple[str, str]]:
    [row] = _explain.layers(layer().to(dtype), images().to(dtype))
    return row.paths


def add(path: str, name: str = "forward", sizes: tuple[int, ...] = SIZES) -> None:
    """As if ``path`` were ten times as fast as the library."""
    times = {"library": 10.0, path: 1.0} if path != "library" else {"library": 1.0, "f2x2": 10.0, "f4x4": 10.0}
    _measured.add(CPU, [(shape_of(name, sizes=sizes), times)])


has_winograd = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs kernels"
)


# ------------------------------------------------------------------------------------------------------- measurements


@has_winograd
def test_every_path_of_a_step_is_measured_kept_and_found_by_the_next_process(capsys):
    model, x = layer().to(memory_format=torch.channels_last), images()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    tuning = ran_ext.tune(model, x, rounds=1)
    assert {one.shape[2] for one in tuning.passes} == {"forward", "dgrad", "wgrad"}
    assert all({"library", "f2x2"} <= one.times.keys() for one in tuning.passes)
    assert {one.shape[4] for one in tuning.passes} == {SIZES}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert "3 passes measured" in str(tuning)
    assert str(tuning.file) in str(tuning)
    assert all(why.endswith("tuned here") for _, why in paths().values())
    held = dict(_measured._tuned[CPU])
    forget()
    assert dict(_measured._tuned[CPU]) == held
    assert all(why.endswith("tuned here") for _, why in paths().values())
    assert "tuned            passes at their shapes: cpu 3" in ran_ext._info.report()


@has_winograd
def test_the_fastest_measured_path_is_taken_at_its_shape_alone():
    assert paths()["forward"] == ("fused", "Winograd F(2x2, 3x3); by rule")
    add("library")
    assert paths()["forward"] == ("library", "PyTorch's is faster; tuned here")
    assert paths()["dgrad"][1].endswith("by rule")
    assert paths(torch.bfloat16)["forward"][1].endswith("by rule")
    add("f2x2", sizes=(4, *SIZES[1:]))
    assert paths()["forward"] == ("library", "PyTorch's is faster; tuned here")


@has_winograd
def test_what_is_taken_is_what_is_computed():
    module, x = layer()[0].eval(), images()
    by_rule = module(x)
    with ran_ext.set_conv3x3("library"):
        library = module(x)
    assert not torch.equal(by_rule, library)
    add("library")
    assert torch.equal(module(x), library)
    add("f2x2")
    assert torch.equal(module(x), by_rule)


@has_winograd
def test_accuracy_comes_before_speed():
    """F(4x4) of 32 channels rounds too much forward; in the data gradient it is allowed, but not when strict."""
    add("f4x4")
    assert "F(4x4" not in paths()["forward"][1]
    add("f4x4", "dgrad")
    assert paths()["dgrad"] == ("fused", "Winograd F(4x4, 3x3); tuned here")
    with ran_ext.set_conv3x3("strict"):
        assert "F(4x4" not in paths()["dgrad"][1]
    with ran_ext.set_conv3x3("library"):
        assert paths()["dgrad"][0] == "library"


@has_winograd
def test_the_number_of_threads_is_part_of_a_shape():
    _measured.add(CPU, [((CPU, 64, *shape_of()[2:]), {"library": 1.0, "f2x2": 9.0})])
    assert paths()["forward"][1].endswith("by rule")


@has_winograd
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["forward", "dgrad", "wgrad", "conv2d_forward", "conv2d_dgrad", "conv2d_wgrad"])
def test_each_convolution_s_paths_agree(name, dtype, recwarn):
    _measured.load(CPU)
    allowed = ["library", "f2x2", *(["product"] if name == "wgrad" else [])]
    times = _candidates.measure(shape_of(name, dtype), allowed, "library", rounds=1)
    assert list(times) == allowed
    assert not recwarn.list


@pytest.mark.parametrize(("name", "allowed", "sizes"), [
    ("bn_relu", ["resident", "streaming"], (2, 8, 8, 32, 32, 0, 0, 0, 0, 0, 0)),
    ("bn_relu_backward", ["resident", "streaming"], (2, 8, 8, 32, 32, 0, 0, 0, 0, 0, 0)),
    ("gate", ["library", "product"], (2, 4, 4, 32, 16, 1, 1, 2, 2, 0, 0)),
    ("forward", ["library", "product"], (2, 9, 9, 32, 16, 1, 1, 2, 2, 0, 0)),
    ("dgrad", ["library", "product"], (2, 9, 9, 32, 16, 1, 1, 1, 1, 0, 0)),
])  # fmt: skip
def test_a_gpu_s_passes_rehearsed_on_the_cpu(name, allowed, sizes, recwarn):
    """The same code: tensors, comparison, clock. The CPU's kernel runs for both paths where it has one alone."""
    _candidates.tune_unknown(shape_of(name, "bfloat16", sizes), allowed, allowed[0])
    assert _measured._tuned[CPU][shape_of(name, "bfloat16", sizes)].keys() == set(allowed)
    forget()
    assert _measured._tuned[CPU][shape_of(name, "bfloat16", sizes)].keys() == set(allowed)
    assert not recwarn.list


@has_winograd
@pytest.mark.parametrize("inside", ["forward", "backward", "inference"])
def test_a_shape_is_tuned_where_it_is_met(inside, recwarn):
    """The kernels call from below autograd, in the middle of a backward pass, or in inference mode."""
    if inside == "backward":
        x = torch.ones(1, requires_grad=True)
        out = x * 2
        names = ["dgrad", "wgrad", "bn_relu_backward"]
        out.register_hook(lambda _: [tune_unknown(name) for name in names] and None)
        with torch.autocast("cpu", torch.bfloat16):
            out.sum().backward()
    else:
        names = ["forward", "conv2d_forward", "gate"]
        below = torch._C._AutoDispatchBelowAutograd() if inside == "forward" else torch.inference_mode()
        with below:
            for name in names:
                tune_unknown(name)
    assert {shape[2] for shape in _measured._tuned[CPU]} == set(names)
    assert all(len(times) == 2 for times in _measured._tuned[CPU].values())
    assert not recwarn.list


def tune_unknown(name: str) -> None:
    if name.startswith("bn_relu"):
        sizes, allowed = (2, 8, 8, 32, 32, 0, 0, 0, 0, 0, 0), ["resident", "streaming"]
    elif name == "gate":
        sizes, allowed = (2, 4, 4, 32, 16, 1, 1, 2, 2, 0, 0), ["library", "product"]
    else:
        sizes, allowed = SIZES, ["library", "f2x2"]
    _candidates.tune_unknown(shape_of(name, sizes=sizes), allowed, allowed[0])


@has_winograd
def test_a_wrong_path_is_left_out_with_a_warning(monkeypatch):
    run = _candidates._run

    def wrong(path, call):
        return run(path, call) * (1.001 if path == "f2x2" else 1)

    monkeypatch.setattr(_candidates, "_run", wrong)
    with pytest.warns(RuntimeWarning, match="f2x2 of forward in float32 .* left out: its relative error is 0.001"):
        times = _candidates.measure(shape_of(), ["library", "f2x2"], "library", rounds=1)
    assert list(times) == ["library"]


@has_winograd
@pytest.mark.parametrize("fails", ["f2x2", "library"])
def test_a_path_that_runs_out_of_memory_is_left_out(monkeypatch, fails):
    run = _candidates._run

    def scarce(path, call):
        if path == fails:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return run(path, call)

    monkeypatch.setattr(_candidates, "_run", scarce)
    with pytest.warns(RuntimeWarning, match=r"left out: CUDA out of memory. Tried to allocate 2.00 GiB") as said:
        times = _candidates.measure(shape_of(), ["library", "f2x2"], "library", rounds=1)
    assert list(times) == (["library"] if fails == "f2x2" else [])
    assert len(said) == 1


@has_winograd
def test_a_shape_too_large_for_memory_is_left_out(monkeypatch):
    huge = (2**15, 2**10, 2**10, 32, 32, 3, 3, 1, 1, 1, 1)
    with pytest.warns(RuntimeWarning, match="all paths of forward in float32 at x .* left out: .*memory"):
        assert _candidates.measure(shape_of(sizes=huge), ["library", "f2x2"], "library", rounds=1) == {}


@has_winograd
def test_passes_of_a_converted_network_and_of_evaluation():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1))
    model = ran_ext.convert(model.to(memory_format=torch.channels_last))
    names = {shape[2] for shape, _, _ in _tune.passes(model, (images().requires_grad_(),))}
    assert names == {"conv2d_forward", "conv2d_dgrad", "conv2d_wgrad", "forward", "dgrad", "wgrad"}
    with torch.no_grad():
        assert {shape[2] for shape, _, _ in _tune.passes(layer().eval(), (images(),))} == {"forward"}
    with torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(32, 32, 1), layer()).to(memory_format=torch.channels_last)
        assert {shape[3] for shape, _, _ in _tune.passes(model, (images(),))} == {"bfloat16"}


@has_winograd
def test_other_threads_keep_their_paths_while_one_tries():
    module, x, found = layer()[0].eval(), images(), []
    by_rule = module(x)

    def call() -> torch.Tensor:
        thread = threading.Thread(target=lambda: found.append(module(x)))
        thread.start()
        thread.join()
        return module(x)

    assert not torch.equal(_candidates._run("library", call), by_rule)
    assert torch.equal(found[0], by_rule)


@pytest.mark.gpu
def test_a_gpu_tunes_what_it_meets_under_cudnn_benchmark(monkeypatch):
    """Once, outside of capture; explain says so."""
    if not _backend.cuda_built():
        pytest.skip(f"no CUDA kernels: {_backend.why_not_native('cuda')}")
    module = layer(1).to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
    x = images().to("cuda", torch.bfloat16).requires_grad_()
    _measured.load(0)
    module(x).sum().backward()
    assert _measured._tuned[0] == {}
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module(x).sum().backward()
    held = dict(_measured._tuned[0])
    assert {"forward", "dgrad", "wgrad"} <= {shape[2] for shape in held}
    assert all({"library", "product"} == times.keys() for shape, times in held.items() if shape[2] == "forward")
    module(x).sum().backward()
    assert _measured._tuned[0] == held
    [row] = _explain.layers(module, x)
    assert all(why.endswith("tuned here") for _, why in row.paths.values())


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_network_without_passes_of_several_paths():
    with pytest.raises(ValueError, match="tune: no pass of model, a Linear, has more than one path on these inputs"):
        ran_ext.tune(nn.Linear(2, 2), torch.randn(2, 2))


@pytest.mark.parametrize(("arguments", "named", "error", "text"), [
    (("model",), {}, TypeError, "tune: model must be an nn.Module, got str"),
    ((nn.Linear(2, 2),), {"rounds": 0}, ValueError, "tune: rounds must be at least 1, got 0"),
    ((nn.Linear(2, 2),), {"rounds": 2.5}, TypeError, "tune: rounds must be a whole number, got float"),
    ((nn.Linear(2, 2),), {"rounds": True}, TypeError, "tune: rounds must be a whole number, got bool"),
])  # fmt: skip
def test_arguments_are_checked(arguments, named, error, text):
    with pytest.raises(error, match=text):
        ran_ext.tune(*arguments, **named)


def test_the_reference_backend_has_nothing_to_measure():
    with ran_ext.set_backend("reference"), pytest.raises(RuntimeError, match="the reference backend was chosen"):
        ran_ext.tune(layer(), images())


def rows(**changes) -> dict:
    return _measured.as_row(shape_of(), {"library": 1.0, "f2x2": 9.0}) | changes


def content(row: object, **changes) -> str:
    return json.dumps({"format": 1, "tuned": {_measured.machine(CPU): [row]}} | changes)


BAD_FILES = {
    "empty": "",
    "half-written": lambda: content(rows())[:-30],
    "binary": "\x00\x80",
    "another format": lambda: content(rows(), format=2),
    "a list": "[]",
    "no rows": lambda: content(rows(), tuned=[]),
    "deep": "[" * 100_000,
    "no pass": lambda: content(rows(**{"pass": "sideways"})),
    "a pass that is a list": lambda: content(rows(**{"pass": []})),
    "no dtype": lambda: content(rows(dtype="int8")),
    "negative sizes": lambda: content(rows(x=[-8, 32, 16, 16])),
    "too few sizes": lambda: content(rows(weight=[32, 32])),
    "sizes that are true": lambda: content(rows(stride=[True, True])),
    "no threads": lambda: content({key: value for key, value in rows().items() if key != "threads"}),
    "no times": lambda: content(rows(us=None)),
    "an unknown path": lambda: content(rows(us={"sideways": 1.0})),
    "a time of 0": lambda: content(rows(us={"library": 0})),
    "an endless time": lambda: content(rows(us={"library": 1e999})),
    "a row that is a number": lambda: content(3),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_file_is_not_used_and_says_so_once(kind):
    text = BAD_FILES[kind]
    file = _measured.file()
    file.parent.mkdir(parents=True)
    file.write_text(text() if callable(text) else text)
    with pytest.warns(RuntimeWarning, match="is not used, it cannot be read: ") as said:
        forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        forget()
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert _measured._tuned[CPU] == {}
    assert _measured.save(CPU, [(shape_of(), {"library": 1.0})]) == file  # and tuning again mends it
    forget()
    assert _measured._tuned[CPU] == {shape_of(): {"library": 1.0}}


def test_a_file_of_another_machine_or_version_is_kept_and_not_used(monkeypatch):
    _measured.save(CPU, [(shape_of(), {"library": 1.0})])
    here = _measured.machine(CPU)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.warns(RuntimeWarning, match="it was tuned on .*, and this is .*torch 9.9.9") as said:
        forget()
    assert len(said) == 1
    assert _measured._tuned[CPU] == {}
    _measured.save(CPU, [(shape_of("dgrad"), {"library": 2.0})])
    assert _measured.read(_measured.file()).keys() == {here, _measured.machine(CPU)}
    monkeypatch.undo()


def test_the_machine_names_what_changes_speed(monkeypatch):
    name = _measured.machine(CPU)
    assert _backend._C.build_info()["cpu_kernels"] in name
    assert torch.__version__ in name
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert _measured.machine(CPU) != name


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for the file", "a pipe for the file"])
def test_where_nothing_can_be_written_it_holds_for_this_process(tmp_path, obstacle, monkeypatch):
    """Root may write anywhere: what stands in the way is no folder, or no file."""
    if obstacle == "a file for a folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        _measured.file().parent.mkdir()
        (os.mkfifo if "pipe" in obstacle else Path.mkdir)(_measured.file())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be read
        add("library")
    with pytest.warns(RuntimeWarning, match="cannot be written: .*; what was tuned holds for this process"):
        saved = _measured.save(CPU, [(shape_of(), {"library": 1.0})])
    assert saved is None
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert paths()["forward"] == ("library", "PyTorch's is faster; tuned here")


def test_the_cache_folder(monkeypatch, tmp_path):
    assert _measured.file() == tmp_path / "ran_ext" / "tuning.json"
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert _measured.file() == tmp_path / "home" / ".cache" / "ran_ext" / "tuning.json"


WRITER = """
import sys
from ran_ext import _measured
for number in range(20):
    sizes = (int(sys.argv[1]), number, 1, 16, 16, 1, 1, 1, 1, 0, 0)
    assert _measured.save(-1, [((-1, 1, "wgrad", "float32", sizes), {"library": 1.0, "product": 2.0})])
"""


def test_two_processes_that_tune_at_once_keep_both_s_rows(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WRITER]
    running = [subprocess.Popen([*command, str(number)]) for number in (1, 2)]
    assert [one.wait(120) for one in running] == [0, 0]
    forget()
    assert len(_measured._tuned[CPU]) == 40
    assert [path.name for path in _measured.file().parent.iterdir()] == ["tuning.json"]


# ---------------------------------------------------------------------------------------------------- the command line


@has_winograd
def test_the_command_tunes_and_the_next_process_uses_it(capsys):
    threads = torch.get_num_threads()
    command = [sys.executable, "-m", "ran_ext"]
    options = ["tune", "--batch", "2", "--rounds", "1", "--threads", str(threads), "--dtype", "bfloat16"]
    said = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout
    assert "passes measured" in said
    assert f"kept in {_measured.file()}" in said
    assert {row["dtype"] for row in _measured.read(_measured.file())[_measured.machine(CPU)]} == {"bfloat16"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forget()
        assert main(["info"]) == 0
    assert str(_measured.file()) in capsys.readouterr().out


@pytest.mark.parametrize(("options", "text"), [
    (["--batch", "0"], "argument --batch: must be at least 1, got 0"),
    (["--batch", "many"], "argument --batch: invalid whole_number value: 'many'"),
    (["--size", "1"], "error: "),
    (["--model", "resnet"], "invalid choice: 'resnet'"),
    (["--device", "sideways"], "argument --device: must be cpu, cuda or cuda:0 and so on, got sideways"),
    (["--device", "cuda:77"], "error: "),
    (["--round", "3"], "did you mean --rounds?"),
])  # fmt: skip
def test_mistakes_on_the_command_line_are_one_line(options, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--batch", "2", *options])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert text in said
    assert said.count("\n") == 1
