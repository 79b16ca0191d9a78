"""The fused ops. Each has a plain-PyTorch twin beside it (``..._ref``): its fallback and its oracle."""

from . import _fakes  # noqa: F401
from .attention_gate import attention_gate, attention_gate_ref
from .bn_relu import bn_relu, bn_relu_ref
from .bn_relu_conv import BatchStatistics, Chained, bn_relu_conv2d, bn_relu_conv2d_ref, chained_bn_relu_conv2d
from .conv2d import conv2d, conv2d_ref
from .conv_attention_gate import conv_attention_gate, conv_attention_gate_ref
from .max_pool import max_pool2d, max_pool2d_ref
from .upsample_add import upsample_add, upsample_add_ref

__all__ = [
    "BatchStatistics",
    "Chained",
    "attention_gate",
    "attention_gate_ref",
    "bn_relu",
    "bn_relu_conv2d",
    "bn_relu_conv2d_ref",
    "bn_relu_ref",
    "chained_bn_relu_conv2d",
    "conv2d",
    "conv2d_ref",
    "conv_attention_gate",
    "conv_attention_gate_ref",
    "max_pool2d",
    "max_pool2d_ref",
    "upsample_add",
    "upsample_add_ref",
]
