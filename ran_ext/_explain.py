"""What runs for every layer of a network on a given input, why, and what it would take to run the faster way."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from . import _backend
from .nn import AttentionGate, AttentionModule, BNReLU, BNReLUConv2d

PASSES = ("forward", "dgrad", "wgrad")
#: What a pass runs on, for the table.
FUSED, LIBRARY, PLAIN = "fused", "library", "plain PyTorch"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of an op: the module's name, op, input, and for each pass what it runs on and why."""

    name: str
    op: str
    x: str
    ways: dict[str, tuple[str, str]]


def explain(model: nn.Module, *inputs: Tensor) -> None:
    """Print for every layer of ``model`` what runs on ``inputs``, why, and what the faster way would take.

    A copy of the network runs once, in the mode that the network is in and under the autocast that is on; its weights,
    buffers and torch's random numbers are left as they are.

    Args:
        model: holds modules of :mod:`ran_ext.nn`; convolutions of plain PyTorch are listed too.
        inputs: what ``model`` is called with, on its device.

    >>> unit = nn.Sequential(BNReLUConv2d(8, 8, 1))
    >>> with _backend.set_backend("reference"):
    ...     explain(unit, torch.randn(2, 8, 4, 4))
    layer  op              input            forward            dgrad              wgrad
    0      bn_relu_conv2d  2x8x4x4 float32  plain PyTorch [1]  plain PyTorch [1]  plain PyTorch [1]
    [1] the reference backend was chosen: ran_ext.set_backend('auto') takes the kernels
    """
    print(table(layers(model, *inputs)))


def layers(model: nn.Module, *inputs: Tensor) -> list[Layer]:
    """The calls in the order in which they are made."""
    found: list[Layer] = []
    twin = copy.deepcopy(model)
    # Asked before there are hooks, which part the two.
    gates = {m.gate: m.gate_conv for m in twin.modules() if isinstance(m, AttentionModule) and m.gate_conv is not None}
    taken: dict[nn.Module, Tensor] = {}
    for name, module in twin.named_modules():
        if not isinstance(module, (BNReLUConv2d, BNReLU, AttentionGate, nn.Conv2d)):
            continue

        def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            taken[module] = args[0]
            found.append(_describe(name, module, args[0]))
            if module in gates:
                found[-1].ways["forward"] = _gate_way(module, args[0], gates[module], taken[gates[module]])

        module.register_forward_pre_hook(note)
    devices = [x.device for x in inputs if x.is_cuda]
    with torch.no_grad(), torch.random.fork_rng(devices):
        twin(*inputs)
    return found


def table(rows: list[Layer]) -> str:
    """The rows as text, their reasons numbered below."""
    reasons: dict[str, int] = {}
    lines = [["layer", "op", "input", *PASSES]]
    for row in rows:
        cells = []
        for one in PASSES:
            way, why = row.ways.get(one, ("", ""))
            number = f" [{reasons.setdefault(why, len(reasons) + 1)}]" if why else ""
            cells.append(way + number)
        lines.append([row.name, row.op, row.x, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + [f"[{number}] {why}" for why, number in reasons.items()])


def _describe(name: str, module: nn.Module, x: Tensor) -> Layer:
    ops = {BNReLUConv2d: "bn_relu_conv2d", BNReLU: "bn_relu", AttentionGate: "attention_gate"}
    op = ops.get(type(module), "conv2d")
    size = f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
    if isinstance(module, nn.Conv2d):
        return Layer(name, op, size, dict.fromkeys(PASSES, (LIBRARY, "")))
    if missing := _why_plain(x):
        return Layer(name, op, size, dict.fromkeys(PASSES, (PLAIN, missing)))
    if isinstance(module, BNReLUConv2d):
        return Layer(name, op, size, _conv_ways(module, x))
    kernels: Any = _backend._C
    if isinstance(module, BNReLU) and x.is_cuda:
        ways = zip(("forward", "dgrad"), kernels.bn_relu_ways(x), strict=True)
        return Layer(name, op, size, {one: (FUSED, "" if held else f"streamed: {why}") for one, (held, why) in ways})
    return Layer(name, op, size, {"forward": (FUSED, ""), "dgrad": (FUSED, "")})


def _conv_ways(module: BNReLUConv2d, x: Tensor) -> dict[str, tuple[str, str]]:
    if not module.is_fusable:
        why = "bn or conv is of a kind that runs unfused: see BNReLUConv2d"
        return dict.fromkeys(PASSES, (PLAIN, why))
    conv, device = module.conv, x.device.type
    if torch.is_autocast_enabled(device) and x.dtype not in (torch.get_autocast_dtype(device), torch.float64):
        why = f"x is wider than autocast's {torch.get_autocast_dtype(device)}: normalised as it is, rounded once"
        return dict.fromkeys(PASSES, (LIBRARY, why))
    kernels: Any = _backend._C
    ways = zip(PASSES, kernels.conv_ways(x, conv.weight.to(x.dtype), conv.stride, conv.padding), strict=True)
    # Winograd's kernels differ in accuracy; of the others there is one.
    return {
        one: (FUSED, why if why.startswith("Winograd") else "") if fused else (LIBRARY, why)
        for one, (fused, why) in ways
    }


def _gate_way(gate: Any, trunk: Tensor, conv: nn.Conv2d, x: Tensor) -> tuple[str, str]:
    if missing := _why_plain(x):
        return PLAIN, missing
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if trunk.dtype != dtype:
        return FUSED, "the convolution before it apart: trunk is wider"
    kernels: Any = _backend._C
    both, why = kernels.conv_gate_way(trunk, x.to(dtype), conv.weight.to(dtype), gate.scale_factor)
    return FUSED, f"{'with' if both else 'without'} the convolution before it: {why}"


def _why_plain(x: Tensor) -> str:
    if _backend.get_backend() == "reference":
        return "the reference backend was chosen: ran_ext.set_backend('auto') takes the kernels"
    return _backend.why_not_native(x.device.type)
