"""A batch normalisation whose value is not written yet.

A converted batch normalisation takes its statistics at once and returns a :class:`Deferred`. An activation leaves it
deferred, and a convolution takes it in: one op that keeps the raw input alone. Whatever else uses the tensor gets its
value, written out on the spot, so that a program sees no difference but in time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._recipe import Activation, Dropped, Recipe, identity, version
from ._recomputed import activated, recomputed, with_history
from .ops.bn_relu import in_backward

#: What becomes of a normalisation's value: taken in by a kernel, computed again in backward, or neither.
FUSED, RECOMPUTED, WRITTEN_OUT, AS_WRITTEN = "fused", "recomputed", "written out", "as written"

#: What :func:`watch` was given: told of each normalisation, and of what became of its value.
_watcher: Callable[[nn.Module, str], None] | None = None


@contextmanager
def watch(told: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Call ``told(module, outcome)`` for every use of a deferred value inside the block."""
    global _watcher
    before, _watcher = _watcher, told
    try:
        yield
    finally:
        _watcher = before


def is_watched() -> bool:
    """Whether anybody watches: finding the reason of an outcome may take long."""
    return _watcher is not None


def tell(owner: nn.Module | None, outcome: str) -> None:
    """Tell whoever watches."""
    if _watcher is not None and owner is not None:
        _watcher(owner, outcome)


def name_of(act: Activation) -> str:
    """For people."""
    if isinstance(act, Dropped):
        return f"{name_of(act.act)}dropout "
    function = act.func if isinstance(act, partial) else act
    return "" if function is identity else f"{function.__name__} "


def _versions(recipe: Recipe) -> Any:
    """Of what may be written to in between: pieces, parameters, and running statistics that are normalised with."""
    statistics = () if recipe.batch_stats else (recipe.mean, recipe.var)
    return [version(t) for t in (*recipe.pieces, recipe.weight, recipe.bias, *statistics)]


_CHANGED = (
    "ran_ext.convert: an autograd.Function changes the output of a batch normalisation in place, by {}; run that "
    "module as written: ran_ext.revert(module)"
)
_make_wrapper: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def _unwritten(cls: type[Tensor], recipe: Recipe) -> Tensor:
    x = recipe.pieces[0]
    shape, stride = (x.shape, x.stride()) if len(recipe.pieces) == 1 else _joined_layout(recipe.pieces)
    return _make_wrapper(cls, shape, stride, dtype=x.dtype, device=x.device)  # type: ignore[no-any-return]


class Deferred(Tensor):
    """``act(recipe(*recipe.tensors))``: a tensor with shape, strides, dtype and device, not written yet."""

    recipe: Recipe
    act: Activation
    #: Of what the value depends on, when the statistics were taken.
    versions: Any
    #: The value, once something needed it.
    value: Tensor | None = None
    #: The same as a kernel made it for a convolution, which does not keep it: for the next one, and for others.
    made: Tensor | None = None
    #: The module that made it; told what became of it.
    owner: nn.Module | None = None
    #: Of a join: called when its pieces are taken.
    join_taken: Callable[[], None] | None = None

    @classmethod
    def defer(cls, recipe: Recipe, act: Activation, owner: nn.Module | None, versions: Any = None) -> Deferred:
        """The value of ``recipe`` past ``act``, with its history where gradients are taken here.

        Where they are not, whoever uses the value under another grad mode gets none either.
        """
        if not torch.is_grad_enabled():
            recipe = recipe.detached()
        made: Any = with_history(partial(_unwritten, cls, recipe), recipe, act)
        made.recipe, made.act, made.owner = recipe, act, owner
        made.versions = _versions(recipe) if versions is None else versions
        return made  # type: ignore[no-any-return]

    @property
    def is_join(self) -> bool:
        """Whether it is pieces and nothing else."""
        return self.recipe.mean is None and self.act is identity and self.value is None

    def take_pieces(self) -> tuple[Tensor, ...]:
        """The pieces of a join, to be taken in whole; of anything else its value."""
        if not self.is_join:
            return (self.materialise(),)
        self.check_versions()
        if self.join_taken is not None:
            self.join_taken()
        return self.recipe.pieces

    def materialise(self) -> Tensor:
        """The value, from now on: in-place changes, also through views of it, are seen by all who hold this tensor.

        It has its history also where a logging hook asks for it under ``no_grad``.
        """
        self._check_itself()
        if self.value is None:
            self.check_versions()
            self._tell_owner()
            tell(self.owner, f"{WRITTEN_OUT}: {name_of(self.act)}value used by something else than a convolution")
            if torch.is_grad_enabled() or not self.requires_grad:
                self.value = self._compute()
            else:
                with torch.enable_grad():
                    self.value = self._compute()
        value = self.value
        return value.materialise() if isinstance(value, Deferred) else value

    def _compute(self) -> Tensor:
        recipe = self.recipe
        if self.act is identity:
            return recipe.value()
        if self.act is F.relu and recipe.native and len(recipe.pieces) == 1:
            return recipe.relu()
        made = self.make()
        return activated(recipe, self.act) if made is None else made

    def make(self) -> Tensor | None:
        """The value where a kernel makes it, once; its gradients then go back through the normalisation together."""
        made = recomputed(self.recipe, self.act) if self.made is None else self.made
        if made is not None and (torch.is_grad_enabled() or not self.requires_grad) and not made.is_inference():
            self.made = made
        return made

    def _tell_owner(self) -> None:
        """A normalisation whose value is written out as it is need not defer the next time."""
        if self.owner is not None and not is_checkpointed():
            self.owner.__dict__["_written_out"] = self.act is identity  # as it is

    def check_versions(self) -> None:
        """Raises where it, or something that it depends on, was written to since the statistics were taken."""
        self._check_itself()
        if _versions(self.recipe) != self.versions:
            raise RuntimeError(
                f"ran_ext.convert: the input of {self.owner or 'a concatenation'}, or one of its parameters, was "
                "modified in place after it was taken and before the result was used; run this module as written: "
                "ran_ext.revert(module)"
            )

    def _check_itself(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if version(self) > 0:
                raise RuntimeError(_CHANGED.format("mark_dirty"))

    def activated(self, act: Activation, inplace: bool) -> Tensor:
        """``act`` of it."""
        history = torch.is_grad_enabled() or not (inplace and self.requires_grad)
        if self.value is not None or self.act is not identity or self.recipe.mean is None or not history:
            return act(self.materialise(), **({"inplace": True} if inplace else {}))
        made = Deferred.defer(self.recipe, act, self.owner, self.versions)
        if inplace:
            self.value = made
        return made

    def dropped(self, dropout: Callable[..., Tensor], p: float, inplace: bool) -> Tensor | None:
        """It past ``dropout``, which draws its random numbers now; None where it has to be written out."""
        recipe = self.recipe
        x = recipe.pieces[0]
        if self.value is not None or recipe.mean is None or len(recipe.pieces) > 1 or isinstance(self.act, Dropped):
            return None
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        if not (x.is_cpu and dense and torch.is_grad_enabled() and self.requires_grad):
            return None
        kept = dropout(torch.ones_like(x), p) != 0  # in the order of the memory, as of the value
        made = Deferred.defer(recipe, Dropped(self.act, kept, p), self.owner, self.versions)
        if inplace:
            self.value = made
        return made

    def resolve(self) -> Deferred:
        """Itself, or what an activation in place made of it."""
        return self.value.resolve() if isinstance(self.value, Deferred) else self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = TAKEN.get(func)
        if taken is not None:
            found = taken(*args, **kwargs)
            if found is not None:
                return found
        elif func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*map(_real, args), **{name: _real(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached where torch's functions are not asked, as from a Function: autograd has its own node for it."""
        if func._schema.is_mutable:
            raise RuntimeError(_CHANGED.format(func))
        kwargs = kwargs or {}
        return func(*map(_bare, args), **{name: _bare(value) for name, value in kwargs.items()})

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.materialise())

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialise().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)


def _real(value: Any) -> Any:
    """``value`` with what is deferred in it written out."""
    if isinstance(value, Deferred):
        return value.materialise()
    if type(value) in (list, tuple):
        return type(value)(map(_real, value))
    return value


def _bare(value: Any) -> Any:
    """The same below autograd."""
    if isinstance(value, Deferred):
        found = value.resolve()
        if found is not value:
            raise RuntimeError(
                "ran_ext.convert: an activation in place, whose result was not used, changed the output of a batch "
                "normalisation that an autograd.Function takes; use the activation's result"
            )
        if found.value is not None:
            return found.value.detach()
        found.check_versions()
        with torch.no_grad():
            return found.act(found.recipe.value())
    if type(value) in (list, tuple):
        return type(value)(map(_bare, value))
    return value


def _joined_layout(pieces: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the pieces joined along the channels."""
    n, _, height, width = pieces[0].shape
    channels = sum(piece.shape[1] for piece in pieces)
    shape = (n, channels, height, width)
    if all(piece.is_contiguous(memory_format=torch.channels_last) for piece in pieces):
        return shape, (channels * height * width, 1, channels * width, channels)
    return shape, (channels * height * width, height * width, width, 1)


def is_checkpointed() -> bool:
    """Whether an activation checkpoint will run this again, or does: both times must take the same path."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return in_backward() or (hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint")


def join(taken: Callable[[], None], tensors: Any, dim: Any = 0) -> Tensor | None:
    """``torch.cat`` along the channels that keeps the pieces; None where it must be written out."""
    if dim not in (1, -3) or not isinstance(tensors, (list, tuple)) or len(tensors) < 2:
        return None
    flat: list[Tensor] = []
    for piece in tensors:
        if isinstance(piece, Deferred):
            if not piece.is_join:
                return None
            flat += piece.recipe.pieces
        else:
            flat.append(piece)
    first = flat[0]
    if not all(type(t) is Tensor and t.dim() == 4 and t.dtype == first.dtype and t.numel() for t in flat):
        return None
    if any(t.shape[0] != first.shape[0] or t.shape[2:] != first.shape[2:] or t.device != first.device for t in flat):
        return None
    made = Deferred.defer(Recipe(tuple(flat)), identity, None)
    made.join_taken = taken
    return made


#: By torch's function: what takes it over for a deferred argument, and returns None where it has to be written out.
TAKEN: dict[Any, Callable[..., Any]] = {}

_METADATA = {
    Tensor._backward_hooks.__set__,  # type: ignore[union-attr]  # of what a Function changed in place
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")),
    *(getattr(Tensor, name) for name in ("is_complex", "element_size", "get_device", "ndimension", "__len__")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_mkldnn", "is_meta", "_version")),
}
