"""What is aimed at on a GPU, and what the GPU suite's results say of it: a table of targets beside measured figures."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOTH, STEP = "forward + backward", "training step"
EAGER = ("eager channels_last", "eager, CUDA graph")
COMPILED = ("torch.compile", "max-autotune, CUDA graph")
GATES = [f"attention_gate 4096x128x16x16 scale {scale}" for scale in (1, 2)]


class NotMeasured(Exception):
    """A figure that a target needs is not among the results."""


class Results:
    """What the suite's stages measured.

    Args:
        figures: by stage, as in the stages' JSON.
    """

    def __init__(self, figures: Mapping[str, Mapping[str, Any]]):
        self.figures = figures
        self.rows = [row for content in figures.values() for row in content.get("rows", ()) if "suite" in row]

    def select(self, case: str, task: str, dtype: str) -> list[Mapping[str, Any]]:
        """The rows of one case that have a value."""
        key = (case, task, dtype)
        found = [row for row in self.rows if (row["case"], row["task"], row["dtype"]) == key]
        return [row for row in found if row["value"] is not None]

    def ours(self, case: str, task: str, dtype: str) -> float:
        """The least value of ran_ext's own contenders."""
        return least(row["value"] for row in self.select(case, task, dtype) if row["contender"].startswith("ran_ext"))

    def theirs(self, case: str, task: str, dtype: str, rivals: Sequence[str]) -> float:
        """The least value of the rivals."""
        return least(row["value"] for row in self.select(case, task, dtype) if row["contender"] in rivals)

    def faster(self, case: str, task: str, rivals: Sequence[str], dtype: str = "bfloat16") -> float:
        """How many times faster than the fastest of ``rivals``."""
        return self.theirs(case, task, dtype, rivals) / self.ours(case, task, dtype)

    def seeds(self, stage: str, column: str) -> list[float]:
        """A column of a record's rows; a rehearsal's are none."""
        content = self.figures.get(stage, {})
        if not content.get("rows") or content["settings"]["rehearsal"]:
            raise NotMeasured(stage)
        return [row[column] for row in content["rows"]]


def least(values: Iterable[float]) -> float:
    """The smallest value.

    Raises:
        NotMeasured: there is none.
    """
    found = list(values)
    if not found:
        raise NotMeasured
    return min(found)


def gate_bandwidth(results: Results) -> float:
    """Percent of the measured copy bandwidth, in the slower of the two cases."""
    percents = []
    for case in GATES:
        rows = [row for row in results.select(case, BOTH, "bfloat16") if row["contender"].startswith("ran_ext")]
        percents.append(-least(-row["percent"][0] for row in rows))
    return min(percents)


def bn_relu(results: Results, rival: Callable[[str], float]) -> float:
    """Geometric mean over the network's seven shapes of how many times faster than ``rival`` BN-ReLU is, batch 128."""
    convolutions = {row["case"] for row in results.rows if row["case"].startswith("bn_relu_conv2d 128x")}
    cases = [f"bn_relu {case.split()[1]}" for case in convolutions]
    if len(cases) != 7:
        raise NotMeasured
    return statistics.geometric_mean(rival(case) / results.ours(case, BOTH, "bfloat16") for case in cases)


def eager_bn_relu(results: Results) -> float:
    """Against torch's own, in the faster of its dtypes."""
    dtypes = ("bfloat16", "float16")
    return bn_relu(results, lambda case: min(results.theirs(case, BOTH, dtype, EAGER) for dtype in dtypes))


def cudnn_bn_relu(results: Results) -> float:
    """Against cuDNN's fused graph."""
    return bn_relu(results, lambda case: results.theirs(case, BOTH, "bfloat16", ["cuDNN graph API"]))


def units(batch: int) -> Callable[[Results], float]:
    """The sum over the seven BN-ReLU-convolutions, against max-autotune with graphs."""
    case = f"bn_relu_conv2d, sum of 7 shapes, batch {batch}"
    return lambda results: results.faster(case, BOTH, COMPILED[1:])


def step(rival: str) -> Callable[[Results], float]:
    """The training step at batch 128."""
    return lambda results: results.faster("ran_compact batch 128", STEP, [rival])


def memory(results: Results) -> float:
    """Peak bytes of a training step at batch 128, as a share of eager's under autocast."""
    case, task = "ran_compact batch 128", "peak in a training step"
    ours = least(row["value"] for row in results.select(case, task, "bfloat16") if row["contender"] == "ran_ext")
    return ours / results.theirs(case, task, "bfloat16", EAGER)


def sanitizer(results: Results) -> float:
    """Errors that the four tools counted, all together."""
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    counted = [results.figures.get(f"sanitizer-{tool}", {}) for tool in tools]
    if not all("errors" in content for content in counted):
        raise NotMeasured
    return float(sum(content["errors"] for content in counted))


def epoch(results: Results) -> float:
    """Median seconds of an epoch of 50,000 images, augmented, of the record at batch 128."""
    seconds = results.seeds("record-time", "epoch_seconds")
    if results.figures["record-time"]["settings"]["recipe"]["batch_size"] != 128:
        raise NotMeasured
    return statistics.median(seconds)


def mean(stage: str, column: str) -> Callable[[Results], float]:
    """Of a record's column, over its seeds."""
    return lambda results: statistics.mean(results.seeds(stage, column))


@dataclass(frozen=True)
class Target:
    """One figure that is aimed at.

    Args:
        name: what is measured.
        sign: ">=" or "<=".
        wanted: the figure aimed at.
        unit: of both.
        figure: takes it from the results, or raises :class:`NotMeasured`.
    """

    name: str
    sign: str
    wanted: float
    unit: str
    figure: Callable[[Results], float]


TARGETS = (
    Target("attention gate, 256 MB tensors: of the copy bandwidth", ">=", 90, "%", gate_bandwidth),
    Target("attention gate against eager", ">=", 2, "x", lambda r: min(r.faster(c, BOTH, EAGER[:1]) for c in GATES)),
    Target("attention gate against compile", ">=", 1, "x", lambda r: min(r.faster(c, BOTH, COMPILED) for c in GATES)),
    Target("BN-ReLU, 7 shapes, against torch in its faster dtype", ">=", 1.5, "x", eager_bn_relu),
    Target("BN-ReLU, 7 shapes, against cuDNN's graph", ">=", 1, "x", cudnn_bn_relu),
    Target("BN-ReLU-conv, sum, batch 128, against max-autotune", ">=", 1.35, "x", units(128)),
    Target("BN-ReLU-conv, sum, batch 1024, against max-autotune", ">=", 1.2, "x", units(1024)),
    Target("training step against eager NCHW float32", ">=", 8, "x", step("eager NCHW fp32")),
    Target("training step against eager channels_last AMP", ">=", 4, "x", step(EAGER[0])),
    Target("training step against max-autotune with graphs", ">=", 1.35, "x", step(COMPILED[1])),
    Target("peak memory of a step, share of eager AMP", "<=", 0.55, "", memory),
    Target("compute-sanitizer, four tools", "<=", 0, "errors", sanitizer),
    Target("ran_compact's test accuracy in the record", ">=", 0.893, "", mean("record-time", "accuracy")),
    Target("its seconds", "<=", 15, "s", mean("record-time", "seconds")),
    Target("epoch of ran_compact, batch 128", "<=", 0.8, "s", epoch),
    Target("best test accuracy within 6.8 M parameters", ">=", 0.955, "", mean("record-best", "accuracy")),
)


def check(figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every target with its measured figure (None where there is none) and whether it is met.

    Args:
        figures: of each stage of the GPU suite.

    >>> sum(row["measured"] is not None for row in check({}))
    0
    """
    results, rows = Results(figures), []
    for target in TARGETS:
        value: float | None = None
        met: bool | None = None
        with contextlib.suppress(NotMeasured):
            value = target.figure(results)
            met = value >= target.wanted if target.sign == ">=" else value <= target.wanted
        wanted = f"{target.sign} {target.wanted:g} {target.unit}".strip()
        rows.append({"target": target.name, "wanted": wanted, "measured": value, "met": met})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What :func:`check` returned, in Markdown."""
    lines = ["| target | wanted | measured | |", "| --- | ---: | ---: | --- |"]
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
        lines.append(f"| {row['target']} | {row['wanted']} | {measured} | {verdict} |")
    return "\n".join(lines)
