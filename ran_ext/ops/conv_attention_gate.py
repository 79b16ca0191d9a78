"""The attention gate with the mask's last 1x1 convolution: one kernel on a GPU where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend, _tracing
from .._paths import gpu_paths
from . import _checks as checks
from .attention_gate import attention_gate, attention_gate_ref


def conv_attention_gate(
    trunk: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale_factor: int = 1
) -> Tensor:
    """``(1 + sigmoid(conv1x1(x))) * trunk``, differentiable in all four tensors.

    Equivalent to::

        attention_gate(trunk, F.conv2d(x, weight, bias), scale_factor)

    On a GPU the convolution's kernel gates the trunk from its own epilogue, in bfloat16 and float16, channels_last and
    with ``scale_factor`` 1 or 2, where :func:`ran_ext.set_conv1x1` or a measurement says so.
    Elsewhere the two run one after the other. Backward keeps ``trunk``, ``x`` and the mask.

    Args:
        trunk: ``(N, C, H, W)``, contiguous or channels_last (kept as given), float16, bfloat16, float32 or float64.
        x: what the convolution takes, ``(N, C_in, ceil(H / s), ceil(W / s))`` for ``scale_factor`` s; dtype and device
            of ``trunk``.
        weight: ``(C, C_in, 1, 1)``.
        bias: ``(C,)`` or None.
        scale_factor: nearest-neighbour up-sampling of the mask, >= 1.

    Returns:
        A tensor of ``trunk``'s shape, dtype and memory format. Under autocast the convolution runs in the lower
        precision and the gate in the wider of the two, as in eager PyTorch.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the rule, and what was given.

    Source: Wang et al. 2017, arXiv:1704.06904, eq. 3.

    >>> trunk, x, weight = torch.ones(1, 8, 3, 3), torch.randn(1, 4, 2, 2), torch.zeros(8, 4, 1, 1)
    >>> conv_attention_gate(trunk, x, weight, scale_factor=2).unique()
    tensor([1.5000])
    """
    if _tracing.is_symbolic(trunk):
        return conv_attention_gate_ref(trunk, x, weight, bias, scale_factor)
    scale_factor = _check(trunk, x, weight, bias, scale_factor)
    # Inductor fuses the plain gate into its neighbours; it cannot fuse an opaque op.
    if torch.compiler.is_compiling() or not _backend.use_native(trunk, x, weight, bias):
        return attention_gate(trunk, F.conv2d(x, weight, bias), scale_factor)
    return torch.ops.ran_ext.conv_attention_gate(trunk, x, weight, bias, scale_factor, gpu_paths(x))[0]


def conv_attention_gate_ref(
    trunk: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale_factor: int = 1
) -> Tensor:
    """:func:`conv_attention_gate` in plain PyTorch: the fallback, and what the kernels are held to."""
    return attention_gate_ref(trunk, F.conv2d(x, weight, bias), scale_factor)


def _check(trunk: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale_factor: int) -> int:
    """Raises what :func:`conv_attention_gate` documents; the factor as an int."""
    op = "conv_attention_gate"
    tensors = {"trunk": trunk, "x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in tensors.items():
        checks.tensor(op, name, value)
    dtypes = {name: t.dtype for name, t in tensors.items()}
    if len(set(dtypes.values())) > 1 and not _backend.autocasts(trunk):
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: all must have one floating-point dtype, got {found}")
    if len({t.device for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{op}: all must be on the same device, got {found}")
    scale_factor = checks.whole(op, "scale_factor", scale_factor, 1)
    if trunk.dim() != 4 or x.dim() != 4:
        raise ValueError(f"{op}: trunk and x must be (N, C, H, W), got trunk {list(trunk.shape)} and x {list(x.shape)}")
    (n, c, h, w), c_in = trunk.shape, x.shape[1]
    expected = [n, c_in, -(-h // scale_factor), -(-w // scale_factor)]
    if list(x.shape) != expected:
        raise ValueError(
            f"{op}: x must be {expected} for trunk {list(trunk.shape)} and scale_factor {scale_factor} "
            f"(height and width divided, rounded up), got x {list(x.shape)}"
        )
    if list(weight.shape) != [c, c_in, 1, 1]:
        raise ValueError(
            f"{op}: weight must be {[c, c_in, 1, 1]} for trunk {list(trunk.shape)} and x "
            f"{list(x.shape)}, got weight {list(weight.shape)}"
        )
    if bias is not None and list(bias.shape) != [c]:
        raise ValueError(f"{op}: bias must be {[c]} for trunk {list(trunk.shape)}, got {list(bias.shape)}")
    return scale_factor
