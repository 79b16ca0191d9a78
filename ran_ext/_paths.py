"""What the user asks for in place of the package's own choice of paths: 3x3 convolutions, 1x1 ones, BN-ReLU."""

from __future__ import annotations

import os
import warnings

from torch import Tensor

from ._choice import Choose, Setting

# In the order of csrc/common/asked.h.
CONV3X3_MODES = ("fast", "strict", "library", "fused")
CONV1X1_PATHS = ("auto", "fused", "library")
BN_RELU_PATHS = ("auto", "resident", "streaming")

_conv3x3 = Setting("conv3x3", "fast")


class set_conv3x3(Choose):
    """Choose what 3x3 convolutions run on, and on the CPU how accurate they are; as a context manager, inside it.

    It concerns channels_last tensors, forward and backward, both as chosen at the forward call: on the CPU stride 1 and
    padding 1, on a GPU 16-bit tensors with BN-ReLU before the convolution, stride 1 or 2, padding 0 or 1. Error below
    is that in float32 on the CPU, the root of the mean square against float64, on dense inputs; ``explain`` prints what
    each pass of a layer takes. A block holds in its own thread (or asyncio task); a call outside of blocks for the
    process.

    Args:
        mode: ``"fast"`` (the default: Winograd's F(4x4, 3x3) or F(2x2, 3x3), whichever is fastest at no more than twice
            PyTorch's own error), ``"strict"`` (F(2x2, 3x3) at most, at no more than 1.2 times), ``"library"``
            (PyTorch's convolution) or ``"fused"`` (on a GPU one kernel, wherever there is one for the shape; on the CPU
            as ``"fast"``). On a GPU ``"fast"`` and ``"strict"`` mean the faster one by measurement,
            :func:`ran_ext.tune`'s or the package's own, else the library's.

    Raises:
        ValueError: ``mode`` is none of these.

    Source: Lavin and Gray 2016, arXiv:1509.09308.

    >>> with set_conv3x3("strict"):
    ...     get_conv3x3()
    'strict'
    """

    setting = _conv3x3

    def __init__(self, mode: str):
        _require("set_conv3x3: mode", mode, CONV3X3_MODES)
        super().__init__(mode)


def get_conv3x3() -> str:
    """The mode of 3x3 convolutions chosen here: ``"fast"``, ``"strict"``, ``"library"`` or ``"fused"``."""
    return _conv3x3.chosen()


_conv1x1 = Setting("conv1x1", "auto")


class set_conv1x1(Choose):
    """Choose what 1x1 convolutions run on, on a GPU; as a context manager, inside it.

    It concerns 16-bit channels_last tensors with BN-ReLU before the convolution or an attention gate behind it, forward
    and backward, both as chosen at the forward call. A block holds in its own thread (or asyncio task); a call outside
    of blocks for the process.

    Args:
        path: ``"auto"`` (the default: the faster one by measurement, :func:`ran_ext.tune`'s or the package's own, else
            the library's), ``"fused"`` (one kernel, wherever there is one for the shape) or ``"library"`` (PyTorch's
            convolution after one pass of BN-ReLU).

    Raises:
        ValueError: ``path`` is none of these.

    >>> with set_conv1x1("fused"):
    ...     get_conv1x1()
    'fused'
    """

    setting = _conv1x1

    def __init__(self, path: str):
        _require("set_conv1x1: path", path, CONV1X1_PATHS)
        super().__init__(path)


def get_conv1x1() -> str:
    """The path of 1x1 convolutions on a GPU chosen here: ``"auto"``, ``"fused"`` or ``"library"``."""
    return _conv1x1.chosen()


_bn_relu = Setting("bn_relu", "auto")


class set_bn_relu(Choose):
    """Choose what BN-ReLU runs on, on a GPU; as a context manager, inside it.

    It concerns channels_last tensors normalised with the batch's own statistics, forward and backward, both as chosen
    at the forward call. A block holds in its own thread (or asyncio task); a call outside of blocks for the process.

    Args:
        path: ``"auto"`` (the default: the faster one by measurement, :func:`ran_ext.tune`'s or the package's own, else
            resident), ``"resident"`` (one kernel that holds the tensor in shared memory, wherever it fits) or
            ``"streaming"`` (kernels for any size).

    Raises:
        ValueError: ``path`` is none of these.

    >>> with set_bn_relu("streaming"):
    ...     get_bn_relu()
    'streaming'
    """

    setting = _bn_relu

    def __init__(self, path: str):
        _require("set_bn_relu: path", path, BN_RELU_PATHS)
        super().__init__(path)


def get_bn_relu() -> str:
    """The path of BN-ReLU on a GPU chosen here: ``"auto"``, ``"resident"`` or ``"streaming"``."""
    return _bn_relu.chosen()


def paths(x: Tensor) -> int:
    """What is asked for here of an op with a convolution, as it takes that: csrc/common/asked.h."""
    return CONV3X3_MODES.index(_conv3x3.chosen()) + gpu_paths(x)


def gpu_paths(x: Tensor) -> int:
    """The same of an op without one: what concerns GPUs alone, so that a call on the CPU asks nothing."""
    if x.is_cpu:
        return 0
    return 4 * CONV1X1_PATHS.index(_conv1x1.chosen()) + 12 * BN_RELU_PATHS.index(_bn_relu.chosen())


def _require(asked: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{asked} must be one of {', '.join(known)}, got {name!r}")


def _from_environment(variable: str, setter: type[set_conv1x1 | set_bn_relu], known: tuple[str, ...]) -> None:
    """The older way to ask, for the whole process."""
    if name := os.environ.get(variable):
        _require(f"the environment variable {variable}", name, known)
        warnings.warn(f"{variable} is deprecated: call ran_ext.{setter.__name__}({name!r})", DeprecationWarning, 2)
        setter(name)


_from_environment("RAN_EXT_CONV1X1", set_conv1x1, CONV1X1_PATHS)
_from_environment("RAN_EXT_BN_RELU", set_bn_relu, BN_RELU_PATHS)
