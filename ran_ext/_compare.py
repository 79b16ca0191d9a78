"""``ran_ext.compare``: what converting a network gains on this machine."""

from __future__ import annotations

import collections
import copy
import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ._convert import convert, revert
from ._deferred import watch


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A network as it is written and converted, in training.

    Attributes:
        plain_bytes, converted_bytes: kept from forward to backward, parameters left out.
        plain_seconds, converted_seconds: median of a step, forward and backward.
        speedup: median over the rounds of plain / converted.
        outcomes: how often the value of a normalisation was fused, recomputed, written out, left as written.
    """

    plain_bytes: int
    converted_bytes: int
    plain_seconds: float
    converted_seconds: float
    speedup: float
    outcomes: dict[str, int]

    def __str__(self) -> str:
        plain, converted = self.plain_bytes / 2**20, self.converted_bytes / 2**20
        share = self.converted_bytes / self.plain_bytes if self.plain_bytes else 1.0
        lines = [
            f"{'':<12}{'as written':>14}{'converted':>14}",
            f"{'kept, MiB':<12}{plain:>14.1f}{converted:>14.1f}   x{share:.2f}",
            f"{'step, ms':<12}{1e3 * self.plain_seconds:>14.1f}{1e3 * self.converted_seconds:>14.1f}"
            f"   {self.speedup:.2f} times as fast",
        ]
        counts = ", ".join(f"{number} {what}" for what, number in self.outcomes.items())
        return "\n".join([*lines, f"normalisations: {counts or 'none converted'}"])


def compare(model: nn.Module, *inputs: Tensor, rounds: int = 5) -> Comparison:
    """Train a copy of ``model`` for some steps as it is written and converted, in turn, and print what differs.

    ``model`` itself, its buffers and torch's random numbers are left as they are. Both copies get channels_last weights
    and inputs.

    Args:
        model: what :func:`ran_ext.convert` takes.
        inputs: what ``model`` is called with, on its device.
        rounds: timed steps of each.

    Returns:
        What was printed, as numbers.

    Raises:
        TypeError: as :func:`ran_ext.convert`; or ``model`` returns no tensor to differentiate.

    >>> block = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> compare(block, torch.randn(2, 3, 8, 8), rounds=1).outcomes  # doctest: +ELLIPSIS
                    as written     converted
    ...
    {'fused': 1}
    """
    devices = [x.device for x in inputs if x.is_cuda]
    with torch.random.fork_rng(devices):
        plain = revert(copy.deepcopy(model)).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        converted = convert(copy.deepcopy(plain))
        images = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
        outcomes: collections.Counter[str] = collections.Counter()
        for network in (plain, converted):
            _step(network, images)  # what is learned in the first step is used in the second
        with watch(lambda module, outcome: outcomes.update([outcome.partition(":")[0].partition(",")[0]])):
            converted_bytes = bytes_kept(converted, images)
        plain_bytes = bytes_kept(plain, images)
        times: list[list[float]] = [[], []]
        for number in range(rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                times[index].append(_seconds(lambda network: _step(network, images), (plain, converted)[index]))
    speedup = statistics.median(one / other for one, other in zip(*times, strict=True))
    medians = [statistics.median(row) for row in times]
    found = Comparison(plain_bytes, converted_bytes, medians[0], medians[1], speedup, dict(outcomes))
    print(found)
    return found


def _step(network: nn.Module, images: list[Tensor]) -> None:
    network.zero_grad(set_to_none=True)
    out = network(*images)
    outs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not outs:
        raise TypeError("ran_ext.compare: model must return a tensor that needs a gradient, got none")
    torch.autograd.backward([t.float().sum() for t in outs])


class _Saved:
    """A tensor as autograd keeps it, and the number of the layer that was running."""

    def __init__(self, tensor: Tensor, layer: int):
        self.tensor, self.layer = tensor, layer


def bytes_kept(network: nn.Module, images: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from a forward pass of ``network`` to backward, its parameters left out."""
    return bytes_by_layer(network, images, lambda: 0).total()


def bytes_by_layer(network: nn.Module, images: Sequence[Tensor], layer: Callable[[], int]) -> collections.Counter[int]:
    """The same by what ``layer()`` says when they are saved; what several keep counts for the first of them."""
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved.add(one := _Saved(tensor, layer()))
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        out = network(*images)
    kept: dict[int, tuple[int, int]] = {}
    for one in sorted(saved, key=lambda one: -one.layer):  # of the graph that ``out`` holds
        storage = one.tensor.untyped_storage()
        kept[storage.data_ptr()] = one.layer, storage.nbytes()
    del out
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    counts: collections.Counter[int] = collections.Counter()
    for number, size in kept.values():
        counts[number] += size
    return counts


def _seconds(work: Callable[[nn.Module], None], network: nn.Module) -> float:
    device = next(network.parameters()).device
    begin = time.perf_counter()
    work(network)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
