"""Modules over :mod:`ran_ext.ops`: they hold parameters and call the ops, which do the mathematics.

Submodules and state_dict keys are those of plain PyTorch (``nn.BatchNorm2d``, ``nn.Conv2d``), so checkpoints,
initialisers, optimizer groups and ``nn.SyncBatchNorm.convert_sync_batchnorm`` work as they always do. What acts through
a call of a submodule (hooks, other classes, a replaced ``forward``) acts here too: the modules are then called one
after the other, and :func:`ran_ext.explain` says why.
"""

from .attention import AttentionGate, AttentionModule, SoftMaskBranch
from .units import BNReLU, BNReLUConv2d, ResidualUnit, SyncBNReLU, convert_sync_batchnorm

__all__ = [
    "AttentionGate",
    "AttentionModule",
    "BNReLU",
    "BNReLUConv2d",
    "ResidualUnit",
    "SoftMaskBranch",
    "SyncBNReLU",
    "convert_sync_batchnorm",
]
