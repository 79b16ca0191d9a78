"""The stages of the GPU suite, in order of value: what each runs, for how long, and what is read from it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _build.native import OBJECTS, find_toolkit

from .check_cuda import find_tool
from .stages import Stage

ROOT = Path(__file__).resolve().parent.parent
#: Makes a stage from its name, minutes and arguments.
Maker = Callable[..., Stage]
#: Where nvidia-smi does not say it: the capability of the GPUs that the suite is written for.
DEFAULT_CAPABILITY = "9.0"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Every op's kernels in bfloat16 on a few small shapes: the sanitizer slows a kernel down 10 to 100 times.
SANITIZED = ["tests/test_cuda.py", "-k", "dtype1 and channels_last and (shape0 or shape4 or fused)"]
#: Processes of pytest on a GPU, each with some hundred MB of it.
WORKERS = "8"
#: The contenders that fit the time budget beside the baseline; ``compare.py`` alone takes all. Autotuning takes minutes
#: a network, so that a budget of less than ``AUTOTUNE_MINUTES`` goes without.
AUTOTUNE_MINUTES = 30
OP_RIVALS = ["eager, CUDA graph", "torch.compile", "max-autotune, CUDA graph", "cuDNN graph API"]
OP_RIVALS += ["ran_ext", "ran_ext, CUDA graph"]
STEP_RIVALS = ["eager NCHW fp32", "eager, CUDA graph", "torch.compile", "max-autotune, CUDA graph"]
STEP_RIVALS += ["ran_ext", "ran_ext, torch.compile", "ran_ext, CUDA graph"]


def stages(options: argparse.Namespace) -> list[Stage]:
    """All stages for ``--device``, ``--quick``, ``--data`` and ``--out``.

    Minutes are those of an H200 with 16 cores; a rehearsal needs less.
    """
    python, out, gpu = sys.executable, options.out.resolve(), options.device == "cuda"
    device, quick = ["--device", options.device], ["--quick"] if options.quick else []
    data, no_data = _data(options, out)
    results = out / "results"

    def launchers(name: str) -> list[str]:
        return ["-m", "tests.emulation.compare_gpu", "--out", str(results / f"{name}.json"), *_on(gpu, options)]

    def script(name: str, minutes: float, *arguments: str | Path, found: Path | None = None, skip: str = "") -> Stage:
        command = [python, *map(str, arguments)]
        return Stage(name, minutes, [] if skip else [command], found, skip=skip)

    def measured(name: str, minutes: float, *arguments: str | Path) -> Stage:
        found = results / f"{name}.json"
        return script(name, minutes, *arguments, "--out", found, *device, *quick, found=found)

    def compared(name: str, minutes: float, suite: str, *arguments: str) -> Stage:
        return measured(name, minutes, "-m", "benchmarks.compare", "--suite", suite, *arguments)

    return [
        _environment(python, gpu),
        _constants(measured("constants", 2, "-m", "benchmarks.constants"), python),
        _build(options, python, gpu),
        _tests(python, gpu),
        script("emulation", 2, *launchers("emulation"), found=results / "emulation.json"),
        _unpack(options, python, out),
        *_records(script, options, [*data, *device, *quick], no_data),
        *(_sanitizer(tool, python, gpu, [python, *launchers(tool)]) for tool in TOOLS),
        measured("dispatch", 2, "-m", "benchmarks.dispatch", *(["--install"] if gpu and not options.quick else [])),
        *_step_benchmarks(compared, options),
        measured("kernels", 2, "-m", "benchmarks.step_kernels"),
        *_op_benchmarks(compared, options),
        *_experiments(script, options, [*data, *device, *quick], data, no_data),
    ]  # fmt: skip


def _on(gpu: bool, options: argparse.Namespace) -> list[str]:
    """The device, and where the kernels' objects are: of a prebuilt folder, or of the stage before."""
    if not gpu:
        return ["--device", "cpu"]
    if options.prebuilt is not None:
        return ["--prebuilt", str(options.prebuilt.resolve())]
    return ["--archs", _capability(), "--objects", str(OBJECTS)]


def _capability() -> str:
    """The compute capability of the GPU at hand, such as 9.0: the one architecture that is compiled for."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return DEFAULT_CAPABILITY
    return said.split()[0] if said.split() else DEFAULT_CAPABILITY


def _build(options: argparse.Namespace, python: str, gpu: bool) -> Stage:
    info = [python, "-m", "ran_ext", "info"]
    if options.prebuilt is not None:
        install = [python, "-m", "scripts.prebuilt", "--install", str(options.prebuilt.resolve())]
        return Stage("build", 1, [install, info])
    build = [python, "setup.py", "build_ext", "--inplace"]
    if not gpu:
        return Stage("build", 4, [build, info])
    return Stage("build", 4, [build, info], environment={"TORCH_CUDA_ARCH_LIST": _capability()})


def _data(options: argparse.Namespace, out: Path) -> tuple[list[str], str]:
    """The arguments that name the unpacked CIFAR-10, and why the whole set cannot be trained on."""
    if options.data is not None:
        return ["--data", str(out / "data")], ""
    return [], "" if options.quick else "no CIFAR-10: give its folder with --data"


def _environment(python: str, gpu: bool) -> Stage:
    commands = [[python, "-m", "ran_ext", "info"]]
    if gpu:
        toolkit = find_toolkit()
        commands += [["nvidia-smi"], [str(toolkit / "bin" / "nvcc") if toolkit else "nvcc", "--version"]]
    return Stage("environment", 1, commands)


def _constants(stage: Stage, python: str) -> Stage:
    """The constants, and the time model with them."""
    model = [python, "-m", "benchmarks.time_model", str(stage.results)]
    return dataclasses.replace(stage, commands=[*stage.commands, model])


def _tests(python: str, gpu: bool) -> Stage:
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not gpu:  # those of one file, which are all skipped, and one that runs
        commands = [
            [*pytest, "tests/test_cuda.py", "-m", "gpu"],
            [*pytest, "tests/test_attention_gate.py", "-k", "empty"],
        ]
    elif importlib.util.find_spec("xdist"):
        commands = [[*pytest, "-v", "--tb=short", "tests", "-m", "gpu", "-n", WORKERS]]
    else:
        commands = [[*pytest, "tests", "-m", "gpu"]]
    return Stage("tests", 4, commands, read=pytest_counts)


def _sanitizer(tool: str, python: str, gpu: bool, launchers: list[str]) -> Stage:
    """memcheck runs the ops' tests, the others every launcher without torch, below which racecheck breaks off itself.

    Without a GPU the tests are only collected, which shows that the selection names some; the launchers have run in the
    stage before.
    """
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SANITIZED]
    name, tests = f"sanitizer-{tool}", tool == "memcheck"
    if not gpu and tests:
        return Stage(name, 2, [[*pytest, "--collect-only"]], skip="no GPU; its tests were collected")
    if not gpu:
        return Stage(name, 1, [], skip="no GPU; its program ran in the stage emulation")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which(f"{home}/bin/compute-sanitizer") or find_tool("compute-sanitizer")
    if sanitizer is None:
        return Stage(name, 2, [], skip="no compute-sanitizer: set CUDA_HOME, or pip install nvidia-cuda-sanitizer-api")
    under = [sanitizer, "--tool", tool, "--error-exitcode", "86", "--show-backtrace", "no"]
    if not tests:
        return Stage(name, 3, [[*launchers, "--under", shlex.join(under)]], read=sanitizer_errors)
    # Each tensor an allocation of its own, so that a byte past its end is nobody's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(name, 4, [[*under, *pytest]], read=sanitizer_errors, environment=environment)


def _rivals(names: list[str], options: argparse.Namespace) -> list[str]:
    return [name for name in names if options.minutes >= AUTOTUNE_MINUTES or "max-autotune" not in name]


def _op_benchmarks(compared: Maker, options: argparse.Namespace) -> list[Stage]:
    quick, rivals = options.quick, _rivals(OP_RIVALS, options)
    both = ["--task", "forward + backward"]
    rounds = ["--rounds", "2"] if quick else []
    chosen = [*both, *rounds, "--contender", *rivals]
    found = [compared("bandwidth", 2, "bandwidth", "--dtype", "bfloat16", *chosen)]
    for batch in (128,) if quick else (128, 1024):
        for dtype in ("bfloat16", "float16"):
            size = [] if quick else ["--batch", str(batch)]
            tasks = ["--task", "forward", "forward + backward"] if dtype == "float16" else both  # cuDNN's convolution
            arguments = [*size, "--dtype", dtype, *tasks, *rounds, "--contender", *rivals]
            found.append(compared(f"ops-{batch}-{dtype}", 8, "ops", *arguments))
    return found


def _step_benchmarks(compared: Maker, options: argparse.Namespace) -> list[Stage]:
    quick = options.quick
    step = ["--dtype", "bfloat16", "--task", "training step", "--contender", *_rivals(STEP_RIVALS, options)]
    size = {batch: [] if quick else ["--batch", str(batch)] for batch in (128, 1024)}
    rounds = ["--rounds", "2"] if quick else []
    found = [
        compared("model-128", 8, "model", *size[128], *rounds, *step),
        compared("memory", 2, "memory", *size[128], "--dtype", "bfloat16"),
    ]
    return found if quick else [*found, compared("model-1024", 8, "model", *size[1024], *step)]


def _unpack(options: argparse.Namespace, python: str, out: Path) -> Stage:
    if options.data is None:
        return Stage("data", 1, [], skip="no --data: what is trained takes the embedded images, or is skipped")
    get = [python, "-m", "ran_ext.data.get_cifar10", "--source", str(options.data.resolve())]
    return Stage("data", 1, [[*get, "--out", str(out / "data")]])


def _records(script: Maker, options: argparse.Namespace, common: list[str], skip: str) -> list[Stage]:
    """The record; a seed on an H200 takes half a minute."""
    folder, seeds = options.out.resolve() / "record", "1" if options.quick else "5"
    record = ["-m", "scripts.record", "--out", folder, *common, "--target", "0.893", "--seeds", seeds]
    return [script("record-time", 3, *record, found=folder / "0.893.json", skip=skip)]


def _experiments(
    script: Maker, options: argparse.Namespace, common: list[str], data: list[str], skip: str
) -> list[Stage]:
    """Longer training: the best network, the reference, the report's experiment, robustness."""
    out, quick = options.out.resolve(), options.quick
    folder = out / "record"
    record = ["-m", "scripts.record", "--out", folder, *common]
    plain = [*record, "--target", "0.893", "--seeds", "1", "--contender", "reference"]
    best = [*record, "--target", "best", "--seeds", "1" if quick else "3"]
    report = ["-m", "scripts.reproduce_report", "--out", out / "report", "--minutes", "{minutes}", *data]
    report += ["--scale", "smoke" if quick else "full", "--device", options.device, "--dtype", "auto"]
    robust = ["-m", "scripts.robustness", "--out", out / "robustness", *data]
    return [
        script("record-best", 8, *best, found=folder / "best.json", skip=skip),
        script("record-reference", 6, *plain, found=folder / "0.893_reference.json", skip=skip),
        script("report", 9, *report, skip=skip),
        script("robustness", 9, *robust, *(["--quick"] if quick else ["--scale", "full"]), skip=skip),
    ]


def pytest_counts(log: str) -> dict[str, Any]:
    """How many tests passed, failed and so on, over all runs in a log.

    Raises:
        ValueError: none passed: all were skipped, which pytest calls success.

    >>> pytest_counts("3 passed, 2 skipped in 1.0s")
    {'passed': 3, 'skipped': 2}
    """
    counts: dict[str, int] = {}
    for line in re.findall(r"^=*\s*(\d+ \w+.*) in [\d.]+s", log, re.MULTILINE):
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", line):
            counts[what] = counts.get(what, 0) + int(number)
    if not counts.get("passed"):
        raise ValueError(f"tests: at least one must pass, got {counts or 'no summary'}; see the log for why they skip")
    return counts


def sanitizer_errors(log: str) -> dict[str, Any]:
    """Errors (hazards, of racecheck) that compute-sanitizer counted.

    Raises:
        ValueError: it printed no summary, so nothing is known.

    >>> sanitizer_errors("========= ERROR SUMMARY: 0 errors")
    {'errors': 0}
    >>> sanitizer_errors("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)")
    {'errors': 2}
    """
    found = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", log)
    if not found:
        raise ValueError("sanitizer: compute-sanitizer printed no summary; see the log")
    return {"errors": sum(map(int, found))}
