"""A network whose weights are cast to 16 bits together, not one by one as autocast does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Whose weights and biases autocast casts to its dtype; a normalisation's stay float32.
CAST = (nn.Conv2d, nn.Linear)


class LowerWeights:
    """``model`` as autocast runs it, with the same bits, but with a few kernels in place of two a tensor.

    The bits of a gradient that is a sum of three (of parts of a batch, and of a penalty) may differ: it is added up in
    another order.

    Before each call the float32 weights of convolutions and linear layers are copied to ``dtype``, all in one go; the
    copies take part in the forward and backward pass. :meth:`add_gradients` adds their gradients to the weights' own.
    Autocast does both tensor by tensor: of a captured step of ``ran_compact`` on an H200 a third of all kernels.

    Args:
        model: one that it :meth:`serves`; weights may change in place between calls, and become frozen; not modules.
        dtype: bfloat16 or float16, that of the autocast which is on during the call.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> lower = LowerWeights(model, torch.bfloat16)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     out = lower(torch.ones(2, 4))
    >>> out.float().sum().backward()
    >>> model[0].weight.grad is None
    True
    >>> lower.add_gradients()
    >>> model[0].weight.grad.dtype
    torch.float32
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model = model
        copies: dict[Tensor, Tensor] = {}  # one of each weight, also of one that several layers share
        #: The copies, by the names that the weights have in the model.
        self.copies: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            for key, weight in module.named_parameters(recurse=False) if type(module) in CAST else ():
                if weight.dtype == torch.float32:
                    copy = copies.setdefault(weight, torch.empty_like(weight, dtype=dtype, requires_grad=False))
                    self.copies[f"{name}.{key}" if name else key] = copy
        self.weights = list(copies.items())

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether all modules of ``model`` are PyTorch's or this package's, and none has a hook.

        Others may compute with a weight in float32 first (weight standardisation), or switch autocast off.

        >>> LowerWeights.serves(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        True
        """
        return all(
            type(module).__module__.split(".")[0] in ("torch", "ran_ext")
            and not module._forward_hooks
            and not module._forward_pre_hooks
            for module in model.modules()
        )

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            if self.weights:
                torch._foreach_copy_([copy for _, copy in self.weights], [weight for weight, _ in self.weights])
        for weight, copy in self.weights:
            copy.requires_grad_(weight.requires_grad)
        return torch.func.functional_call(self.model, self.copies, inputs)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of the copies, which are given up, to those of the weights."""
        held, copied, before = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor]]()
        for weight, copy in self.weights:
            if copy.grad is not None:
                fresh = torch.empty_like(weight)
                if weight.grad is not None:
                    before.append((fresh, weight.grad))
                held.append(fresh)
                copied.append(copy.grad)
                weight.grad, copy.grad = fresh, None
        if held:
            torch._foreach_copy_(held, copied)
        if before:
            torch._foreach_add_([fresh for fresh, _ in before], [grad for _, grad in before])
