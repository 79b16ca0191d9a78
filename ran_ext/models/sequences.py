"""Attention along time: an LSTM whose outputs pass the attention gate."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .. import _tracing
from ..nn import AttentionGate


class AttentionLSTM(nn.Module):
    """Classifies sequences by an LSTM, whose outputs ``T`` become ``(1 + sigmoid(M)) * T``; their mean is classified.

    The mask branch ``M`` is that of images along one dimension: it halves the number of time steps ``depth`` times, a
    convolution of 3 steps after each pooling and before each up-sampling, which adds the level it meets. The gate reads
    the mask at half the steps.

    Args:
        features: of each time step.
        num_classes: logits.
        hidden: the LSTM's width, and the mask's.
        layers: of the LSTM.
        depth: how often the mask halves the number of time steps, >= 1.
        dropout: before the dense layer.
        attention: False leaves out the mask and the gate: a plain LSTM.

    Raises:
        ValueError: at construction, an option is out of range; at the call, sequences of another shape, or too few time
            steps for ``depth``.

    Source: the gate and its mask, Wang et al. 2017, arXiv:1704.06904, sections 3.1 and 3.2.

    >>> AttentionLSTM(features=12, num_classes=4, hidden=16, depth=2)(torch.randn(2, 21, 12)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        hidden: int = 128,
        layers: int = 1,
        depth: int = 2,
        dropout: float = 0.0,
        attention: bool = True,
    ):
        super().__init__()
        if min(features, num_classes, hidden, layers, depth) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "AttentionLSTM: features, num_classes, hidden, layers and depth must be at least 1 and dropout in "
                f"[0, 1), got features={features}, num_classes={num_classes}, hidden={hidden}, layers={layers}, "
                f"depth={depth}, dropout={dropout}"
            )
        self.features = features
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.mask = TimeMask(hidden, depth) if attention else None
        self.gate = AttentionGate(scale_factor=2) if attention else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden, num_classes)
        #: The fewest time steps.
        self.min_steps = 2 ** (depth - 1) + 1 if attention else 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of sequences ``(N, T, features)``."""
        known = not _tracing.is_symbolic(x)
        if known and (x.dim() != 3 or x.shape[2] != self.features or x.shape[1] < self.min_steps):
            raise ValueError(
                f"AttentionLSTM: sequences must be (N, T, {self.features}) with T at least {self.min_steps}, got "
                f"{list(x.shape)}"
            )
        steps = self.lstm(x)[0].transpose(1, 2)
        if self.mask is not None and self.gate is not None:
            # The gate's two dimensions are time and one of size 1.
            steps = self.gate(steps.unsqueeze(3), self.mask(steps).unsqueeze(3)).squeeze(3)
        return self.fc(self.dropout(steps.mean(2)))


class TimeMask(nn.Module):
    """The mask branch along time: from ``(N, C, T)`` logits ``(N, C, ceil(T / 2))``.

    >>> TimeMask(8, depth=3)(torch.randn(2, 8, 13)).shape
    torch.Size([2, 8, 7])
    """

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.down, self.up = (
            nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=1) for _ in range(depth)) for _ in range(2)
        )
        self.last = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pyramid: list[Tensor] = []
        for conv in self.down:
            x = F.relu(conv(F.max_pool1d(x, 2, ceil_mode=True)))
            pyramid.append(x)
        for level in range(len(self.up) - 1, 0, -1):
            upper = pyramid[level - 1]
            x = F.relu(self.up[level](x))
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")[..., : upper.shape[2]] + upper
        return self.last(F.relu(self.up[0](x)))
