"""What is tried: every module and network beside its plain twin, with equal weights, and a batch for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from ecosystem import twins
from torch import Tensor, nn

import ran_ext
from ran_ext import models
from ran_ext import nn as ours

WIDTH = 0.125
#: The networks that have twins.
REPORTS = ("ran_base", "ran_compact", "ran_paper")


@dataclass(frozen=True)
class Subject:
    """A column of the table. ``shapes``: of the inputs, batch included.

    Networks are in float64: in float32 one rounding tips a ReLU or a maximum, and training multiplies the difference.
    """

    name: str
    build: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    folded: bool = False
    dtype: torch.dtype = torch.float32

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The module and its twin, in training mode, channels_last, with the same random weights and statistics."""
        torch.manual_seed(0)
        model, twin = self.build(), self.twin()
        randomise(twin)
        for own, plain in zip(state(model), state(twin), strict=True):
            assert own.shape == plain.shape, self.name
            own.copy_(plain)
        model, twin = (one.to(self.dtype, memory_format=torch.channels_last) for one in (model, twin))
        if self.folded:
            twin.eval().requires_grad_(False)
            return ran_ext.fold_for_inference(model), twin
        return model, twin

    def batch(self, step: int = 0) -> tuple[Tensor, ...]:
        """The inputs of one step, channels_last."""
        random = torch.Generator().manual_seed(step)
        made = (torch.randn(shape, generator=random) for shape in self.shapes)
        return tuple(x.to(self.dtype, memory_format=torch.channels_last) for x in made)


def state(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers in the order in which they were registered, whatever their names."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            yield from (tensor.detach() for tensor in own.values() if tensor is not None)


def randomise(model: nn.Module) -> None:
    """Batch normalisations as after some training: a statistic left at 0 or 1 hides whether it is read."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)


PIXELS, IMAGES = (4, 32, 7, 5), (4, 3, 12, 12)
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "AttentionGate", lambda: ours.AttentionGate(2), lambda: twins.AttentionGate(2), (PIXELS, (4, 32, 4, 3))
        ),
        Subject("BNReLU", lambda: ours.BNReLU(32), lambda: twins.BNReLU(32), (PIXELS,)),
        Subject(
            "BNReLUConv2d",
            lambda: ours.BNReLUConv2d(32, 32, 3, padding=1),
            lambda: twins.BNReLUConv2d(32, 32, 3, padding=1),
            (PIXELS,),
        ),
        Subject(
            "ResidualUnit",
            lambda: ours.ResidualUnit(32, 64, 32, 2),
            lambda: twins.ResidualUnit(32, 64, 32, 2),
            (PIXELS,),
        ),
        Subject(
            "SoftMaskBranch",
            lambda: ours.SoftMaskBranch(32, 2, skip=True),
            lambda: twins.SoftMaskBranch(32, 2, skip=True),
            (PIXELS,),
        ),
        Subject(
            "AttentionModule", lambda: ours.AttentionModule(32, 1), lambda: twins.AttentionModule(32, 1), (PIXELS,)
        ),
        *(
            Subject(
                name,
                lambda n=name: models.create_model(n, width=WIDTH),
                lambda n=name: getattr(twins, n)(WIDTH),
                (IMAGES,),
                dtype=torch.float64,
            )
            for name in REPORTS
        ),
        Subject(
            "folded", lambda: models.ran_compact(width=WIDTH), lambda: twins.ran_compact(WIDTH), (IMAGES,), folded=True
        ),
    )
}
NETWORKS = frozenset({*REPORTS, "folded"})
