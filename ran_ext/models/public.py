"""Weights of the public PyTorch re-implementation of Wang et al. 2017, and the networks that they fit.

github.com/tengshaofeng/ResidualAttentionNetwork-pytorch differs from :class:`ran_ext.models.AttentionNetwork` in this:
masks pool by 3x3 and up-sample bilinearly with aligned corners; each level of the mask's U is added as it is and
through a unit; the trunk is added to the mask before its 1x1 convolutions; where a unit changes the shape, the
shortcut's convolution takes the input behind batch normalisation and ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _fusion
from .._errors import one_line
from .._files import require_regular
from ..nn import AttentionGate, BNReLU, BNReLUConv2d, ResidualUnit
from .classifier import StagedNetwork, no_pool, pool2, pool3

#: By the side of the first convolution: its stride, what follows it, the depths of the masks in the three stages, the
#: stride of the fourth stage, and the smallest image.
FORMS: dict[int, tuple[int, Callable[[Tensor], Tensor], tuple[int, int, int], int, int]] = {
    7: (2, pool3, (3, 2, 1), 2, 17),
    5: (1, pool2, (2, 1, 0), 1, 6),
    3: (1, no_pool, (2, 1, 0), 1, 3),
}


def load_public(path: str | Path) -> PublicAttentionNetwork:
    """The network in a file of github.com/tengshaofeng/ResidualAttentionNetwork-pytorch, in evaluation mode.

    It gives the outputs of the network that the file was saved from: ``ResidualAttentionModel_56`` or ``_92`` at 224
    pixels, ``ResidualAttentionModel_92_32input`` or ``_92_32input_update`` at 32; and takes images of other sizes too.
    Their input is the image divided by 255.

    Args:
        path: of a ``state_dict`` that ``torch.save`` wrote. Nothing in it is executed (``weights_only``).

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no ``state_dict``, or one of another network; the text names the first wrong key.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "bert.pt"
    >>> torch.save({"embeddings.weight": torch.zeros(3, 2)}, path)
    >>> load_public(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: load_public: .../bert.pt is of another network: it has no conv1.0.weight
    """
    state = _read(Path(path))
    state = {key.removeprefix("module."): value for key, value in state.items()}  # of DataParallel
    try:
        network = _made_for(state)
        names = _names(network)
        # Batches were not counted when the public files were written.
        lacking = [key for key in names if key not in state and not key.endswith("num_batches_tracked")]
        if lacking:
            raise KeyError(lacking[0])
    except KeyError as error:
        raise ValueError(f"load_public: {path} is of another network: it has no {error.args[0]}") from None
    # Each of their units has a fourth convolution, and calls it where the shape changes.
    known = names.keys() | {key.replace(".conv1.weight", ".conv4.weight") for key in names}
    if unknown := sorted(state.keys() - known):
        raise ValueError(f"load_public: {path} is of another network: it has {unknown[0]}")
    there = network.state_dict()
    for key, name in names.items():
        if key in state and state[key].shape != there[name].shape:
            raise ValueError(
                f"load_public: {path} is of another network: {key} is {list(state[key].shape)}, not "
                f"{list(there[name].shape)}"
            )
    network.to(state["fc.weight"].dtype).load_state_dict(
        {name: state.get(key, there[name]) for key, name in names.items()}
    )
    return network.eval()


class PublicAttentionNetwork(StagedNetwork):
    """The public networks; :func:`load_public` makes them.

    Args:
        kernel_size: of the first convolution: 7 for ImageNet, 5 and 3 for CIFAR with and without a 2x2 pooling.
        widths: channels of the first convolution and of the four stages.
        modules: attention modules in each of the first three stages.
        num_classes, in_channels: outputs of the dense layer, image channels.
    """

    def __init__(
        self,
        kernel_size: int,
        widths: tuple[int, int, int, int, int],
        modules: tuple[int, int, int],
        num_classes: int,
        in_channels: int = 3,
    ):
        super().__init__()
        stride, _, depths, last_stride, self.min_size = FORMS[kernel_size]
        self.kernel_size, self.in_channels = kernel_size, in_channels
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size, stride, kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(
                _unit(widths[i], widths[i + 1], 2 if i else 1),
                *(PublicAttentionModule(widths[i + 1], depths[i]) for _ in range(modules[i])),
            )
            for i in range(3)
        )
        self.stage4 = nn.Sequential(
            _unit(widths[3], widths[4], last_stride), *(_unit(widths[4], widths[4]) for _ in range(2))
        )
        self.bn2 = nn.BatchNorm2d(widths[4])
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(widths[4], num_classes)

    @property
    def pool(self) -> Callable[[Tensor], Tensor]:
        return FORMS[self.kernel_size][1]


class PublicAttentionModule(nn.Module):
    """The public networks' attention module.

    Args:
        channels: of input and output.
        depth: how often the mask halves the resolution; 0: two units, and the trunk is not added.

    >>> PublicAttentionModule(8, depth=2)(torch.randn(2, 8, 13, 9)).shape
    torch.Size([2, 8, 13, 9])
    """

    def __init__(self, channels: int, depth: int):
        super().__init__()

        def units(count: int) -> list[nn.Module]:
            return [_unit(channels, channels) for _ in range(count)]

        self.depth = depth
        (self.pre,) = units(1)
        self.trunk = nn.Sequential(*units(2))
        self.down = nn.ModuleList(units(max(depth - 1, 0)))
        self.middle = nn.Sequential(*units(2))
        self.skip, self.up = nn.ModuleList(units(len(self.down))), nn.ModuleList(units(len(self.down)))
        self.conv1, self.conv2 = (BNReLUConv2d(channels, channels, 1, bias=False) for _ in range(2))
        self.gate = AttentionGate()
        (self.post,) = units(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        trunk, mask, levels = self.trunk(x), x, list[Tensor]()
        for unit in self.down:
            mask = unit(pool3(mask))
            levels.append(mask)
        mask = self.middle(pool3(mask) if self.depth else mask)
        for level in range(len(levels) - 1, -1, -1):
            upper = levels[level]
            mask = self.up[level](_upsampled(mask, upper) + upper + self.skip[level](upper))
        mask = _upsampled(mask, trunk) + trunk if self.depth else mask
        return self.post(self.gate(trunk, self.conv2(self.conv1(mask))))


class ProjectedUnit(nn.Module):
    """A pre-activation bottleneck whose shortcut, a 1x1 convolution, takes the input behind BN and ReLU.

    Args:
        in_channels, out_channels, stride: as in :class:`ran_ext.nn.ResidualUnit`; a quarter as wide inside.

    >>> ProjectedUnit(8, 16, stride=2)(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        mid = out_channels // 4
        self.activation = BNReLU(in_channels)
        self.conv1 = nn.Conv2d(in_channels, mid, 1, bias=False)
        self.conv2 = BNReLUConv2d(mid, mid, 3, stride, 1, bias=False)
        self.conv3 = BNReLUConv2d(mid, out_channels, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        return self.conv3(self.conv2(_fusion.conv2d(self.conv1, x)), _fusion.conv2d(self.shortcut, x))


def _unit(into: int, out: int, stride: int = 1) -> nn.Module:
    if into != out or stride != 1:
        return ProjectedUnit(into, out, stride)
    return ResidualUnit(into, out, out // 4, bias=False)


def _upsampled(mask: Tensor, upper: Tensor) -> Tensor:
    return F.interpolate(mask, size=upper.shape[2:], mode="bilinear", align_corners=True)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file."""
    require_regular(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of pickle, zip and tar, many kinds
        raise ValueError(f"load_public: {path} holds no state_dict: {one_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"load_public: {path} holds no state_dict but a {type(state).__name__}")
    return state


def _made_for(state: dict[str, Tensor]) -> PublicAttentionNetwork:
    """The network of the form and the widths of ``state``; KeyError where a key is lacking."""
    first = state["conv1.0.weight"]
    if first.dim() != 4 or first.shape[2] not in FORMS:
        raise KeyError(f"conv1.0.weight of {', '.join(map(str, FORMS))} pixels: it is {list(first.shape)}")
    widths = tuple(state[f"residual_block{i}.conv3.weight"].shape[0] for i in range(1, 5))
    attended = {key.split(".")[0] for key in state}
    modules = tuple(
        sum(bool(re.fullmatch(rf"attention_module{i}(_\d)?", name)) for name in attended) for i in (1, 2, 3)
    )
    return PublicAttentionNetwork(
        first.shape[2],
        (first.shape[0], *widths),  # type: ignore[arg-type]
        modules,  # type: ignore[arg-type]
        len(state["fc.bias"]),
        first.shape[1],
    )


def _names(network: PublicAttentionNetwork) -> dict[str, str]:
    """Our key for each of theirs."""
    names = {"conv1.0": "conv1", "conv1.1": "bn1", "mpool2.0": "bn2", "fc": "fc"}
    for i, stage in enumerate(network.stages[:3], 1):
        names |= _unit_names(f"residual_block{i}", f"stage{i}.0", stage.get_submodule("0"))
        for j, module in enumerate(list(stage.children())[1:], 1):
            theirs = f"attention_module{i}" + (f"_{j}" if j > 1 else "")
            names |= _module_names(theirs, f"stage{i}.{j}", module, network.kernel_size == 7)
    for i, unit in enumerate(network.stages[3].children()):
        names |= _unit_names(f"residual_block{4 + i}", f"stage4.{i}", unit)
    ours = network.state_dict()
    return {
        f"{theirs}.{key.removeprefix(f'{own}.')}": key
        for theirs, own in names.items()
        for key in ours
        if key.startswith(f"{own}.")
    }


def _unit_names(theirs: str, ours: str, unit: nn.Module) -> dict[str, str]:
    projected = isinstance(unit, ProjectedUnit)
    names = {"bn1": "activation.bn", "conv1": "conv1"} if projected else {"bn1": "conv1.bn", "conv1": "conv1.conv"}
    names |= {"bn2": "conv2.bn", "conv2": "conv2.conv", "bn3": "conv3.bn", "conv3": "conv3.conv"}
    names |= {"conv4": "shortcut"} if projected else {}
    return {f"{theirs}.{key}": f"{ours}.{value}" for key, value in names.items()}


def _module_names(theirs: str, ours: str, module: Any, imagenet: bool) -> dict[str, str]:
    depth = module.depth
    units = {"first_residual_blocks": "pre", "last_blocks": "post"}
    units |= {f"trunk_branches.{i}": f"trunk.{i}" for i in range(2)}
    middle, last = "middle_2r_blocks", "conv1_1_blocks"
    if imagenet:
        middle, last = f"softmax{depth}_blocks", f"softmax{2 * depth}_blocks"
    units |= {f"{middle}.{i}": f"middle.{i}" for i in range(2)}
    for level in range(len(module.down)):
        down, up = f"down_residual_blocks{level + 1}", f"up_residual_blocks{level + 1}"
        if imagenet:
            down, up = f"softmax{level + 1}_blocks", f"softmax{2 * depth - 1 - level}_blocks"
        units |= {down: f"down.{level}", up: f"up.{level}"}
        units |= {f"skip{level + 1}_connection_residual_block": f"skip.{level}"}
    names: dict[str, str] = {}
    for key, value in units.items():
        names |= _unit_names(f"{theirs}.{key}", f"{ours}.{value}", module.get_submodule(value))
    for place, value in ((0, "conv1.bn"), (2, "conv1.conv"), (3, "conv2.bn"), (5, "conv2.conv")):
        names[f"{theirs}.{last}.{place}"] = f"{ours}.{value}"
    return names
