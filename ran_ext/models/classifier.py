"""What all networks for images share: a last dense layer, the images they take, and the rules of their options."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .. import _fusion, _tracing
from ..ops import max_pool2d


class ImageClassifier(nn.Module):
    """A network that makes logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``.

    Attributes:
        fc: the last dense layer.
        in_channels: image channels.
        min_size: the smallest height and width.
    """

    fc: nn.Linear
    in_channels: int
    min_size: int

    def l2_penalty(self) -> Tensor:
        """Sum of squares of the dense layer's weight: the report's "L2 norm", to be scaled and added to the loss.

        >>> from ran_ext.models import ran_compact
        >>> model = ran_compact()
        >>> bool(torch.isclose(model.l2_penalty(), (model.fc.weight**2).sum()))
        True
        """
        return self.fc.weight.square().sum()

    def _require_images(self, x: Tensor) -> None:
        require_images(x, self.in_channels, self.min_size, type(self).__name__)


class StagedNetwork(ImageClassifier):
    """A convolution, a pooling, stages (``stage1`` and so on), average pooling, a dense layer.

    Attributes:
        conv1: the first convolution.
        bn1, bn2: batch normalisation before the stages and behind them, each with a ReLU; or None.
        pool: what follows ``bn1``, a function.
        dropout: before the dense layer.
    """

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d | None
    bn2: nn.BatchNorm2d | None
    dropout: nn.Dropout
    #: Batch normalisations that run with a ReLU in one op: plain modules, so that keys and tools know them.
    with_relu = ("bn1", "bn2")

    @property
    def pool(self) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError

    @property
    def stages(self) -> list[nn.Module]:
        """``stage1`` and those that follow it."""
        return [module for name, module in self.named_children() if name.startswith("stage")]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)`` of any size from ``min_size``."""
        self._require_images(x)
        x = _fusion.conv2d(self.conv1, x)
        if self.bn1 is not None:
            x = _fusion.bn_relu(self.bn1, x)
        x = self.pool(x)
        for stage in self.stages:
            x = stage(x)
        if self.bn2 is not None:
            x = _fusion.bn_relu(self.bn2, x)
        return self.fc(self.dropout(x.mean((2, 3))))


def pool2(x: Tensor) -> Tensor:
    """2x2 max-pooling; an odd row or column is left out."""
    return max_pool2d(x, ceil_mode=False)


def pool3(x: Tensor) -> Tensor:
    """3x3 max-pooling of stride 2."""
    return F.max_pool2d(x, 3, stride=2, padding=1)


def no_pool(x: Tensor) -> Tensor:
    """``x`` itself."""
    return x


def require_images(x: Tensor, channels: int, least: int, kind: str) -> None:
    """Raise ValueError unless ``x`` is what a network takes: ``(N, channels, H, W)``, both sides ``least`` or more."""
    if not _tracing.is_symbolic(x) and (x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < least):
        raise ValueError(
            f"{kind}: images must be (N, {channels}, H, W) with H and W at least {least}, got {list(x.shape)}"
        )


def require_options(
    kind: str, num_classes: int, in_channels: int, dropout: float, width: float, flags: dict[str, bool]
) -> None:
    """Raise TypeError or ValueError where an option that all networks share is none."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{kind}: {name} must be true or false, got {flag!r}")
    if not 0 < width < math.inf or num_classes < 1 or in_channels < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"{kind}: width (finite), num_classes and in_channels must be positive and dropout in [0, 1), got "
            f"width={width}, num_classes={num_classes}, in_channels={in_channels}, dropout={dropout}"
        )


def scaled(channels: int, width: float, multiple: int = 8) -> int:
    """``channels`` times ``width``, rounded to ``multiple``, and at least that."""
    return max(multiple, round(channels * width / multiple) * multiple)
