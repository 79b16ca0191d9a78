"""``ran_ext.tune``: what is fastest on this machine, measured on it, and kept."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import _backend, _candidates, _measured
from ._explain_converted import is_converted
from ._measured import Shape, Times
from ._wrappers import copied, eagerly, unwrapped


@dataclasses.dataclass(frozen=True)
class TunedPass:
    """A pass at a shape: the path it takes now, the one of the rule on paper, and the microseconds of each."""

    shape: Shape
    path: str
    rule: str
    times: Times

    def __str__(self) -> str:
        row = _measured.as_row(self.shape, self.times)
        of = [f"{name} {'x'.join(map(str, row[name]))}" for name in ("x", "weight") if name in row]
        times = ", ".join(f"{path} {us:.0f}" for path, us in sorted(self.times.items(), key=lambda item: item[1]))
        return f"{row['pass']} {row['dtype']}, {', '.join(of)}: {self.path} for {self.rule} ({times} us)"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured; as text, what it changes.

    Attributes:
        passes: those that have more than one path, each shape once; without those of which no path could be measured.
        file: where the measurements are kept; None where they could not be written.
    """

    passes: tuple[TunedPass, ...]
    file: Path | None

    @property
    def changed(self) -> tuple[TunedPass, ...]:
        """The passes that take another path than by the rule."""
        return tuple(one for one in self.passes if one.path != one.rule)

    def __str__(self) -> str:
        timed = [(one.times[one.rule], one.times[one.path]) for one in self.passes if one.rule in one.times]
        rule, tuned = (sum(times) / 1e3 for times in zip(*timed, strict=True)) if timed else (0.0, 0.0)
        lines = [str(one) for one in self.changed]
        lines.append(f"{len(self.passes)} passes measured, {len(lines)} take another path than by rule")
        lines.append(f"each shape once: {rule:.2f} ms by rule, {tuned:.2f} ms tuned")
        lines.append(f"kept in {self.file}" if self.file else "not kept: this holds for this process")
        return "\n".join(lines)


def tune(model: nn.Module, *inputs: Tensor, rounds: int = _candidates.ROUNDS) -> Tuning:
    """Measure, on this machine, every path that the passes of ``model`` can take on ``inputs``; the fastest run then.

    What is fast depends on the processor, its caches, the number of threads and the library. Without measurements a
    rule chooses that was made on other machines. A training step of a copy of ``model`` (in evaluation: a forward pass)
    tells which passes there are, under the autocast that is on; ``model`` and torch's random numbers are left as they
    are. Then each pass runs on random tensors of the same shape: the library's convolution, products, Winograd's tiles;
    on a GPU fused kernels and the library's, tensors held in shared memory and streamed. Paths take turns; a path
    replaces the one of the rule where its median time is less than the least time of that, by 3 % or more. A path that
    is off by more than twice PyTorch's own error is left out, with a warning, and what :func:`ran_ext.set_conv3x3`
    forbids is never taken, however fast it is.

    The measurements hold from now on in this process, and are kept in ``$XDG_CACHE_HOME/ran_ext/tuning.json``
    (``~/.cache/ran_ext/tuning.json``), where later processes find them: for the same processor or GPU, number of
    threads, versions of torch and this package, dtype and shape. Delete the file to forget them. Results stay within
    the rule of accuracy, but are not the same bits where another path computes them.

    Args:
        model: holds modules of :mod:`ran_ext.nn`, was given to :func:`ran_ext.convert`, or calls :mod:`ran_ext.ops`;
            channels_last, on its device.
        inputs: what ``model`` is called with, channels_last, of the batch that is trained with.
        rounds: how often each path of a pass is timed.

    Returns:
        The measurements; ``print`` shows what takes another path than before.

    Raises:
        TypeError: ``model`` is not a module, or ``rounds`` not a whole number.
        ValueError: ``rounds`` is less than 1, or no pass of ``model`` has more than one path.
        RuntimeError: the kernels are missing for the device, or the reference backend was chosen.

    Source: as ``torch.backends.cudnn.benchmark``; for a network as a whole, Ansel et al. 2014, OpenTuner.

    >>> from ran_ext.nn import BNReLUConv2d
    >>> unit = BNReLUConv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    >>> images = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    >>> sorted(one.shape[2] for one in tune(unit, images, rounds=1).passes)
    ['dgrad', 'forward', 'wgrad']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(rounds, int) or isinstance(rounds, bool):
        raise TypeError(f"tune: rounds must be a whole number, got {type(rounds).__name__}")
    if rounds < 1:
        raise ValueError(f"tune: rounds must be at least 1, got {rounds}")
    require_kernels(next((t.device for t in (*inputs, *model.parameters())), torch.device("cpu")))
    asked = passes(model, inputs)
    if not asked:
        raise ValueError(
            f"tune: no pass of model, a {type(model).__name__}, has more than one path on these inputs: it takes "
            "modules of ran_ext.nn, ops of ran_ext.ops, or ran_ext.convert(model); model and inputs in channels_last"
        )
    kernels: Any = _backend._C
    found: dict[int, list[TunedPass]] = collections.defaultdict(list)
    for shape, allowed, rule in tqdm(asked, desc="tune", unit="pass", leave=False, disable=None):
        if times := _candidates.measure(shape, allowed, rule, rounds):
            _measured.add(shape[0], [(shape, times)])
            found[shape[0]].append(TunedPass(shape, kernels.chosen_path(shape, allowed, rule), rule, times))
    path: Path | None = None
    for index, measured in found.items():
        path = _measured.save(index, [(one.shape, one.times) for one in measured])
    return Tuning(tuple(one for measured in found.values() for one in measured), path)


def require_kernels(device: torch.device) -> None:
    """Raise unless there are kernels to measure on ``device``."""
    if _backend.get_backend() == "reference":
        raise RuntimeError("tune: the reference backend was chosen; ran_ext.set_backend('auto') takes the kernels")
    if missing := _backend.why_not_native(device.type):
        raise RuntimeError(f"tune: there are no kernels to measure on {device.type}: {missing}")


def passes(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[Shape, list[str], str]]:
    """The passes of a step that have several paths: shape, paths, and the rule's. BN-ReLU first: others hold it."""
    kernels: Any = _backend._C
    devices = [x.device for x in inputs if x.is_cuda]
    with torch.random.fork_rng(devices), eagerly():
        twin = copied(unwrapped(model))
        if is_converted(twin):
            twin(*inputs)  # a normalisation learns from its first call
        kernels.record_shapes(True)
        try:
            out = twin(*inputs)
            leaves = torch.utils._pytree.tree_leaves(out)
            outs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
            if twin.training and outs:
                torch.autograd.backward([t.float().sum() for t in outs])
        finally:
            kernels.record_shapes(False)
    found: list[tuple[Shape, list[str], str]] = kernels.recorded_shapes()
    return sorted(found, key=lambda one: (not one[0][2].startswith("bn_relu"), str(one)))
