"""A value computed from a tensor, kept as long as the tensor does not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """Keeps what ``make`` made of a tensor; makes it again for another tensor, new contents or new memory.

    A write through ``tensor.data`` or a NumPy view is not counted by autograd, and so not seen. A tensor
    made in inference mode has no such count, so nothing is kept for it. Copies and pickles are empty.

    >>> kept, weight = Kept(), torch.ones(2)
    >>> kept(weight, lambda: weight.sum().item())
    2.0
    >>> _ = weight.mul_(3)
    >>> kept(weight, lambda: weight.sum().item())
    6.0
    """

    def __init__(self) -> None:
        self._made: tuple[Tensor, int, Tensor, T] | None = None

    def __call__(self, tensor: Tensor, make: Callable[[], T]) -> T:
        if tensor.is_inference():
            return make()
        if self._made is not None:
            of, version, memory, value = self._made
            if of is tensor and version == tensor._version and memory.is_set_to(tensor):
                return value
        # The tensor and an alias of its memory: while they live, no others have their addresses.
        version, memory = tensor._version, tensor.data
        value = make()
        self._made = tensor, version, memory, value
        return value

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()
