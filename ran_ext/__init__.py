"""Residual attention networks with fused BN-ReLU-Conv and attention-gate kernels for training in PyTorch."""

import importlib

from . import data, models, nn, ops
from ._attach import AttachedAttention, attach_attention
from ._backend import get_backend, set_backend
from ._compare import compare
from ._convert import convert, fused, revert
from ._explain import explain
from ._info import info
from ._paths import get_bn_relu, get_conv1x1, get_conv3x3, set_bn_relu, set_conv1x1, set_conv3x3
from ._tune import tune
from .inference import fold_for_inference

__version__ = "0.1.0"
__all__ = [
    "AttachedAttention",
    "attach_attention",
    "compare",
    "convert",
    "data",
    "explain",
    "fold_for_inference",
    "fused",
    "get_backend",
    "get_bn_relu",
    "get_conv1x1",
    "get_conv3x3",
    "info",
    "models",
    "nn",
    "ops",
    "revert",
    "set_backend",
    "set_bn_relu",
    "set_conv1x1",
    "set_conv3x3",
    "tune",
]


def __getattr__(name: str) -> object:
    if name == "train":  # on first use, so that ops alone import no trainer
        return importlib.import_module("ran_ext.train")
    raise AttributeError(f"module 'ran_ext' has no attribute {name!r}")
