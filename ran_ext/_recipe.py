"""How a value that is not written yet is computed: a batch normalisation of pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._paths import gpu_paths, paths

Activation = Callable[[Tensor], Tensor]
Optional = Tensor | None


def identity(z: Tensor) -> Tensor:
    """No activation."""
    return z


@dataclasses.dataclass(frozen=True, eq=False)
class Dropped:
    """An activation, and dropout behind it, with the random numbers that it drew.

    Attributes:
        act: the activation.
        kept: True where dropout kept a value: of the value's shape, or ``(N, C, 1, 1)``; None while autograd has it.
        p: the probability that a value was dropped.
    """

    act: Activation
    kept: Tensor | None
    p: float

    def noise(self, dtype: torch.dtype) -> Tensor:
        """What the values are multiplied by, as torch's dropout makes it on the CPU."""
        assert self.kept is not None
        return self.kept.to(dtype).div_(1 - self.p)

    def __call__(self, z: Tensor) -> Tensor:
        return self.act(z) * self.noise(z.dtype)


def save(ctx: Any, recipe: Recipe, act: Activation, tensors: Sequence[Optional]) -> None:
    """Have autograd keep the tensors, and what ``act`` holds, for the backward pass of ``ctx``: see :func:`saved`."""
    ctx.norm, ctx.act = recipe.norm, act
    if isinstance(act, Dropped):
        ctx.act, tensors = dataclasses.replace(act, kept=None), (act.kept, *tensors)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Norm, Activation, tuple[Optional, ...]]:
    """What :func:`save` was given: the recipe's ``norm``, the activation and the tensors."""
    if isinstance(ctx.act, Dropped):
        kept, *tensors = ctx.saved_tensors
        return ctx.norm, dataclasses.replace(ctx.act, kept=kept), tuple(tensors)
    return ctx.norm, ctx.act, ctx.saved_tensors


def version(t: Tensor | None) -> int:
    """A number that changes with every write to ``t``; of what :func:`counts_writes` says yes to."""
    return -1 if t is None or t.is_inference() else t._version


def counts_writes(*tensors: Tensor | None) -> bool:
    """Whether torch counts writes to the tensors: not to those made in inference mode."""
    return not any(t is not None and t.is_inference() for t in tensors)


class Norm(NamedTuple):
    """Of a recipe, what is no tensor."""

    batch_stats: bool
    eps: float
    native: bool


class Recipe(NamedTuple):
    """A batch normalisation, where there is one, of pieces joined along the channels.

    Attributes:
        pieces: ``(N, C_i, H, W)``; most often one.
        weight, bias: of the normalisation, or None.
        mean, var: None where nothing is normalised.
        batch_stats: whether they are the pieces' own, which the derivative must know.
        eps: added to the variance.
        native: whether the compiled ops serve these tensors.
    """

    pieces: tuple[Tensor, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    batch_stats: bool = False
    eps: float = 0.0
    native: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that the value depends on."""
        return self.mean, self.var, self.weight, self.bias, *self.pieces

    @property
    def norm(self) -> Norm:
        """All else."""
        return Norm(self.batch_stats, self.eps, self.native)

    def detached(self) -> Recipe:
        """The same of tensors that take no gradient."""
        weight, bias = (None if t is None else t.detach() for t in (self.weight, self.bias))
        return self._replace(pieces=tuple(piece.detach() for piece in self.pieces), weight=weight, bias=bias)

    def value(self) -> Tensor:
        """What stands before the activation."""
        return value_of(self.norm, *self.tensors)

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        """The convolution of ``relu(value)`` in one op; ``x``: the pieces joined."""
        out: Tensor = torch.ops.ran_ext.bn_relu_conv2d(
            x, weight, bias, running=[], bn_weight=self.weight, bn_bias=self.bias, mean=self.mean, var=self.var,
            batch_stats=self.batch_stats, eps=self.eps, stride=stride, padding=padding, paths=paths(x),
        )[0]  # fmt: skip
        return out

    def relu(self) -> Tensor:
        """``relu(value)`` in one op, of one piece."""
        out: Tensor = torch.ops.ran_ext.bn_relu(
            self.pieces[0],
            self.weight,
            self.bias,
            self.mean,
            self.var,
            self.batch_stats,
            [],
            None,
            self.eps,
            gpu_paths(self.pieces[0]),
        )[0]
        return out


def joined(pieces: Sequence[Any]) -> Tensor:
    """The pieces as one tensor."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)  # type: ignore[arg-type]


def split(dx: Optional, pieces: Sequence[Any]) -> Sequence[Optional]:
    """The pieces' own parts of a gradient."""
    if dx is None or len(pieces) == 1:
        return [dx] * len(pieces)
    return dx.split([piece.shape[1] for piece in pieces], 1)


def value_of(norm: Norm, mean: Optional, var: Optional, weight: Optional, bias: Optional, *pieces: Any) -> Tensor:
    """What stands before the activation, of a recipe's ``norm`` and ``tensors``."""
    x = joined(pieces)
    if mean is None:
        return x
    if norm.batch_stats:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)
