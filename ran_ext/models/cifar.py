"""The three networks of the report's Table 1: compact ("our model"), base and paper."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..nn import AttentionModule, ResidualUnit
from .classifier import StagedNetwork, no_pool, pool2, require_options, scaled


class ResidualAttentionNetwork(StagedNetwork):
    """Residual attention network for small images; use :func:`ran_compact`, :func:`ran_base` or :func:`ran_paper`.

    Args:
        modules: attention modules in stage 1 (depth 2) and stage 2 (depth 1).
        regularised: BN + ReLU after the first convolution and before the average pool.
        skip: skip connections in the masks.
        num_classes, in_channels: outputs of the dense layer, image channels.
        dropout: probability before the dense layer.
        conv_bias: whether the convolutions have biases.
        width: multiplier of every width, rounded to a multiple of 8.
        attention: False takes the masks out and puts as many parameters into the trunk; see :func:`trunk_module`.
        stem_pool: False leaves out the stem's 2x2 pooling: twice the resolution, four times the work, the same weights.
    """

    def __init__(
        self,
        modules: tuple[int, int],
        regularised: bool,
        skip: bool,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
        conv_bias: bool = True,
        width: float = 1.0,
        attention: bool = True,
        stem_pool: bool = True,
    ):
        super().__init__()
        flags = {"conv_bias": conv_bias, "attention": attention, "stem_pool": stem_pool}
        require_options("ResidualAttentionNetwork", num_classes, in_channels, dropout, width, flags)

        def module(channels: int, depth: int) -> nn.Module:
            if attention:
                return AttentionModule(channels, depth, skip=skip, bias=conv_bias)
            return trunk_module(channels, depth, bias=conv_bias)

        c0, c1, c2, c3, mid = (scaled(c, width) for c in (32, 128, 256, 1024, 64))
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, c0, 5, padding=2, bias=conv_bias)
        self.bn1 = nn.BatchNorm2d(c0) if regularised else None
        self.stem_pool = stem_pool
        self.stage1 = nn.Sequential(
            ResidualUnit(c0, c1, c0, bias=conv_bias),
            *(module(c1, depth=2) for _ in range(modules[0])),
        )
        self.stage2 = nn.Sequential(
            ResidualUnit(c1, c2, mid, stride=2, bias=conv_bias),
            *(module(c2, depth=1) for _ in range(modules[1])),
        )
        self.stage3 = nn.Sequential(
            ResidualUnit(c2, c3, mid, stride=2, bias=conv_bias),
            *(ResidualUnit(c3, c3, mid, bias=conv_bias) for _ in range(2)),
        )
        self.bn2 = nn.BatchNorm2d(c3) if regularised else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c3, num_classes)

    #: The smallest image side: stage 1's attention module (depth 2) needs 3 pixels after the 2x2 pool.
    min_size = 6

    @property
    def pool(self) -> Callable[[Tensor], Tensor]:
        return pool2 if self.stem_pool else no_pool


def trunk_module(channels: int, depth: int, bias: bool = True) -> nn.Sequential:
    """An attention module of Table 1 (p = 1, t = 2, r = 1) without its mask, at equal parameters (within 0.1 %).

    The mask's units continue the trunk; its two 1x1 convolutions (2 C^2 weights) become a unit of mid width 3/8 C
    (2.02 C^2). All of them work at full resolution, so that the whole network needs 1.5 times the operations.

    >>> modules = AttentionModule(128, depth=2), trunk_module(128, depth=2)
    >>> [sum(p.numel() for p in module.parameters()) for module in modules]
    [1484032, 1484704]
    """
    units = [ResidualUnit(channels, channels, channels, bias=bias) for _ in range(4 + 2 * depth)]
    return nn.Sequential(*units, ResidualUnit(channels, channels, 3 * channels // 8, bias=bias))


def ran_compact(
    num_classes: int = 10,
    in_channels: int = 3,
    dropout: float = 0.5,
    conv_bias: bool = True,
    width: float = 1.0,
    attention: bool = True,
    stem_pool: bool = True,
) -> ResidualAttentionNetwork:
    """The report's own network: one attention module a stage, BN + ReLU in stem and head, dropout; 6.8 M parameters.

    >>> sum(p.numel() for p in ran_compact().parameters())
    6810570
    >>> sum(p.numel() for p in ran_compact(attention=False).parameters())
    6813098
    """
    return ResidualAttentionNetwork(
        (1, 1),
        True,
        False,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        conv_bias=conv_bias,
        width=width,
        attention=attention,
        stem_pool=stem_pool,
    )


def ran_base(
    num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0, conv_bias: bool = True, width: float = 1.0
) -> ResidualAttentionNetwork:
    """The report's network before regularisation: no BN + ReLU in stem and head, no dropout.

    >>> sum(p.numel() for p in ran_base().parameters())
    6808458
    """
    return ResidualAttentionNetwork(
        (1, 1),
        False,
        False,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        conv_bias=conv_bias,
        width=width,
    )


def ran_paper(
    num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0, conv_bias: bool = True, width: float = 1.0
) -> ResidualAttentionNetwork:
    """The report's shrunk copy of Wang et al. 2017: a further attention module, mask skip connections; 11.5 M.

    >>> sum(p.numel() for p in ran_paper().parameters())
    11460618
    """
    return ResidualAttentionNetwork(
        (1, 2),
        False,
        True,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        conv_bias=conv_bias,
        width=width,
    )
