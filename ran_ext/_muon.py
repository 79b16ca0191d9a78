"""The optimizer Muon for convolutions, in a form that a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Of the quintic iteration, and how often it runs: singular values come to lie between about 0.7 and 1.2.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
#: From so many columns a row on a CPU iterates a matrix by its Gram matrix. CUDA's bfloat16 products outrun that.
WIDE = 4
#: Of the weights whose steps are orthogonalized: the share of the learning rate, and the momentum.
SHARE, MOMENTUM = 0.25, 0.6


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular vectors stay, singular values of about 1 take the place.

    Newton and Schulz's iteration in matrix products alone, in the dtype of ``matrices``, but for the Gram matrices of
    wide ones on a CPU, which are at least float32; what is 0 stays 0.

    Args:
        matrices: floating point ``(N, rows, columns)``.

    Returns:
        Likewise.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    >>> values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 8, 32)))
    >>> 0.6 < values.min() and values.max() < 1.2
    tensor(True)
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.device.type == "cpu" and x.shape[2] >= WIDE * x.shape[1]:
        x = _factor(x).to(x.dtype) @ x
    else:
        a, b, c = COEFFICIENTS
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _factor(x: Tensor) -> Tensor:
    """What the iteration multiplies ``x`` by, of its square Gram matrix alone: few products of the long rows.

    In float32 at least: each iteration multiplies errors in small eigenvalues by up to 12, too much for bfloat16.
    """
    a, b, c = COEFFICIENTS
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    gram = x @ x.mT
    product = torch.Tensor()
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if iteration else factor
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    return product


class Muon(Optimizer):
    """Nesterov momentum whose step is orthogonalized for convolutions' weights, as matrices of an output channel a row.

    Such a weight moves by ``lr / 4`` times an orthogonal matrix, however large its gradient, and decays apart from it:
    ``w *= 1 - lr * weight_decay``. All other parameters follow Nesterov SGD, as ``torch.optim.SGD`` has it.

    ``torch.optim.Muon`` takes matrices alone, multiplies in bfloat16 also where that is slow, and its learning rate is
    a Python number, which a captured step would freeze.

    Args:
        groups: with ``params``, ``weight_decay`` and ``orthogonal``, whether the group's steps are orthogonalized.
        lr: a tensor on the parameters' device.
        momentum: in [0, 1), of what is not orthogonalized; the others' is 0.6.
        bfloat16: whether the matrix products are in that, else in float32.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    >>> weight = torch.nn.Parameter(torch.zeros(4, 8, 3, 3))
    >>> group = {"params": [weight], "weight_decay": 0.0, "orthogonal": True}
    >>> muon = Muon([group], torch.tensor(0.4), momentum=0.9)
    >>> weight.grad = 1e-3 * torch.randn(4, 8, 3, 3)
    >>> muon.step()
    >>> values = torch.linalg.svdvals(weight.detach().flatten(1))
    >>> bool(0.06 < values.min() and values.max() < 0.12)
    True
    """

    def __init__(self, groups: list[dict[str, Any]], lr: Tensor, momentum: float, bfloat16: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "bfloat16": bfloat16})
        for group in self.param_groups:
            group["momentum"] = MOMENTUM if group["orthogonal"] else momentum
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the parameters that have gradients, after ``closure`` has made them anew; what that returned."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
            orthogonal, decay = group["orthogonal"], group["weight_decay"]
            if decay and not orthogonal:
                gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            steps = list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))
            if orthogonal:
                _orthogonalize(steps, torch.bfloat16 if group["bfloat16"] else torch.float32)
            torch._foreach_mul_(steps, group["lr"])
            if decay and orthogonal:
                torch._foreach_mul_(parameters, 1 - group["lr"] * decay)
            torch._foreach_sub_(parameters, steps)
        return loss


def _orthogonalize(steps: list[Tensor], dtype: torch.dtype) -> None:
    """In place; weights of one shape together, as the small products of each alone would not fill a GPU."""
    shapes: dict[torch.Size, list[int]] = {}
    for index, step in enumerate(steps):
        shapes.setdefault(step.shape, []).append(index)
    for shape, indices in shapes.items():
        out, into, *kernel = shape
        # channels last, as weights mostly lie, so without a copy; the order of a row's elements does not matter
        rows = [steps[index].movedim(1, -1).reshape(out, -1).to(dtype) for index in indices]
        # a tall matrix's step is longer, so that each of its outputs changes as much as a square one's
        matrices = orthogonalize(torch.stack(rows)) * (SHARE * max(1.0, out / rows[0].shape[1]) ** 0.5)
        for index, matrix in zip(indices, matrices.unbind(), strict=True):
            steps[index].copy_(matrix.view(out, *kernel, into).movedim(-1, 1))
