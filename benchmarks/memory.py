"""Bytes that autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], object], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that ``forward`` saves for backward, less those of ``excluded``.

    Args:
        forward: whatever it returns is kept until the count is taken, so that no address is used twice.
        excluded: parameters, buffers and the images, which are there in any case.

    >>> import torch
    >>> x = torch.ones(4, requires_grad=True)
    >>> saved_bytes(lambda: x.exp().sin(), [x])  # exp keeps its result, sin its input: one storage of 4 floats
    16
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(size for size, _ in kept.values())
    del result
    return total
