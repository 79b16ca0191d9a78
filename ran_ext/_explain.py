"""What runs for every layer of a network on a given input, why, and what the faster path needs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _backend, _fusion
from ._compare import bytes_by_layer, bytes_kept
from ._compiled import outcomes
from ._convert import revert
from ._converted import defers
from ._deferred import FUSED, Deferred, watch
from ._explain_converted import (
    LIBRARY,
    PASSES,
    fused_paths,
    is_converted,
    is_taken,
    joined,
    norm_paths,
    plain_paths,
    taken_paths,
)
from ._paths import gpu_paths
from ._wrappers import copied, eagerly, is_compiled, unwrapped
from .nn import AttentionGate, AttentionModule, BNReLU, BNReLUConv2d

#: What a pass runs on, for the table.
PLAIN = "plain PyTorch"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of an op: the module's name, op, input, for each pass what it runs on and why, and bytes kept.

    ``kept``: for backward, from this call up to the next one listed; None where the network is not training.
    """

    name: str
    op: str
    x: str
    paths: dict[str, tuple[str, str]]
    kept: int | None = None


def explain(model: nn.Module, *inputs: Tensor) -> None:
    """Print a summary, and for every layer of ``model`` what runs on ``inputs``, why, and what the faster path needs.

    The summary counts the layers by what their forward pass runs on; in training also the megabytes (10^6 bytes) that
    are kept from forward to backward, parameters left out, beside those of plain PyTorch. The last column has them by
    layer: what is kept from its call up to that of the next one listed, counted where it is kept first. Where a pass
    has several paths, the reason ends with who chose: ``tuned here`` (:func:`ran_ext.tune`), ``shipped measurement``,
    ``asked for`` (:func:`ran_ext.set_conv1x1`, :func:`ran_ext.set_bn_relu`) or ``by rule``.

    Of a compiled network the table says how it runs uncompiled; of a converted one a last line says which
    normalisations ``torch.compile``'s graphs fuse, and why it leaves the others to Inductor.

    Copies of the network run, in the mode that the network is in and under the autocast that is on; its weights,
    buffers and torch's random numbers are left as they are.

    Args:
        model: holds modules of :mod:`ran_ext.nn`, or was given to :func:`ran_ext.convert`; convolutions of plain
            PyTorch are listed too.
        inputs: what ``model`` is called with, on its device.

    Raises:
        ValueError: ``model`` calls nothing that could be listed.

    >>> unit = nn.Sequential(BNReLUConv2d(8, 8, 1))
    >>> with _backend.set_backend("reference"):
    ...     explain(unit, torch.randn(2, 8, 4, 4))
    1 layer: 1 plain PyTorch; kept for backward: 0.0 MB, in plain PyTorch 0.0 MB
    layer  op              input            forward            dgrad              wgrad              kept, MB
    0      bn_relu_conv2d  2x8x4x4 float32  plain PyTorch [1]  plain PyTorch [1]  plain PyTorch [1]  0.00
    [1] the reference backend was chosen: ran_ext.set_backend('auto') takes the kernels
    """
    rows = layers(model, *inputs)
    print(summary(rows, kept(model, *inputs)))
    print(table(rows))
    if is_compiled(model) and is_converted(unwrapped(model)):
        print(in_graphs(copied(unwrapped(model)), inputs))


def in_graphs(network: nn.Module, inputs: Sequence[Tensor]) -> str:
    """The normalisations of a converted network that ``torch.compile`` fuses, and why not the others."""
    devices = [x.device for x in inputs if x.is_cuda]
    with torch.random.fork_rng(devices):
        found = outcomes(network, inputs, defers)
    left: dict[str, list[str]] = {}
    for name, why in found:
        if why:
            left.setdefault(why, []).append(name)
    done = len(found) - sum(map(len, left.values()))
    line = f"under torch.compile: {done} of {len(found)} batch normalisations fused with the convolutions behind them"
    return "\n".join([line, *(f"left to Inductor: {', '.join(names)}: {why}" for why, names in left.items())])


def kept(model: nn.Module, *inputs: Tensor) -> tuple[int, int] | None:
    """Bytes kept from forward to backward, as the network runs and in plain PyTorch; None where it is not training."""
    network = unwrapped(model)
    if not _trains(network):
        return None
    devices = [x.device for x in inputs if x.is_cuda]
    with torch.random.fork_rng(devices), eagerly():
        ours = copied(network)
        if is_converted(ours):
            ours(*inputs)  # a normalisation learns from its first call
        as_it_runs = bytes_kept(ours, inputs)
        with _backend.set_backend("reference"):
            return as_it_runs, bytes_kept(revert(ours), inputs)


def _trains(network: nn.Module) -> bool:
    """Whether something is kept for backward."""
    return network.training and torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters())


def summary(rows: list[Layer], bytes_of: tuple[int, int] | None) -> str:
    """The first line: layers by path, and the memory.

    >>> summary([Layer("conv", "conv2d", "", {"forward": ("library", "")})] * 2, (1_500_000, 3_000_000))
    '2 layers: 2 library; kept for backward: 1.5 MB, in plain PyTorch 3.0 MB'
    """
    paths = collections.Counter(row.paths.get("forward", ("", ""))[0] or "taken in later" for row in rows)
    counts = ", ".join(f"{number} {path}" for path, number in paths.most_common())
    line = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}: {counts}"
    if bytes_of is None:
        return line
    ours, plain = (f"{number / 1e6:.1f} MB" for number in bytes_of)
    return f"{line}; kept for backward: {ours}, in plain PyTorch {plain}"


def layers(model: nn.Module, *inputs: Tensor) -> list[Layer]:
    """The calls in the order in which they are made."""
    found: list[Layer] = []
    twin = copied(unwrapped(model))
    calls = _calls(twin)  # asked before our own hooks are there, which would count as reasons
    taken: dict[nn.Module, Tensor] = {}
    for name, module in twin.named_modules():
        if module not in calls:
            continue

        def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
            taken[module] = x = next(iter((*args, *named.values())))
            call = calls[module]
            paths = {} if isinstance(x, Deferred) else _paths(call, module, x, taken)
            found.append(Layer(name, call.op, _described(x), paths))

        module.register_forward_pre_hook(note, with_kwargs=True)
    names = {module: name for name, module in twin.named_modules()}

    def told(module: nn.Module, outcome: str) -> None:
        """What became of the value of a converted network's normalisation."""
        if is_taken(outcome):  # by the convolution that was noted last
            last = found[-1]
            conv = twin.get_submodule(last.name)
            op, paths = taken_paths(conv, taken[conv], outcome)  # type: ignore[arg-type]
            found[-1] = dataclasses.replace(last, op=op, paths=paths)
        else:
            found.append(Layer(names[module], "batch_norm", "", norm_paths(outcome)))

    devices = [x.device for x in inputs if x.is_cuda]
    trains = _trains(twin)
    grad = trains or is_converted(twin)  # joins are kept where gradients are taken
    with torch.set_grad_enabled(grad), torch.random.fork_rng(devices), eagerly():
        if is_converted(twin):
            twin(*inputs)  # a normalisation learns from its first call
            found.clear()
        with watch(told):
            if trains:
                bytes_of = bytes_by_layer(twin, inputs, lambda: max(len(found) - 1, 0))
                found = [dataclasses.replace(row, kept=bytes_of[number]) for number, row in enumerate(found)]
            else:
                twin(*inputs)
    if not found:
        kind = type(model).__name__
        raise ValueError(f"explain: model, a {kind}, calls no convolution, attention gate or fused batch normalisation")
    return found


def table(rows: list[Layer]) -> str:
    """The rows as text, their reasons numbered below."""
    reasons: dict[str, int] = {}
    trains = any(row.kept is not None for row in rows)
    lines = [["layer", "op", "input", *PASSES, *(["kept, MB"] if trains else [])]]
    for row in rows:
        cells = []
        for one in PASSES:
            path, why = row.paths.get(one, ("", ""))
            number = f" [{reasons.setdefault(why, len(reasons) + 1)}]" if why else ""
            cells.append(path + number)
        lines.append([row.name, row.op, row.x, *cells, *([f"{(row.kept or 0) / 1e6:.2f}"] if trains else [])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + [f"[{number}] {why}" for why, number in reasons.items()])


@dataclasses.dataclass(frozen=True)
class _Call:
    """The op of a module's call, why it is not fused ("" where it is), and the convolution in a gate's op."""

    op: str
    why: str = ""
    conv: nn.Conv2d | None = None


def _calls(model: nn.Module) -> dict[nn.Module, _Call]:
    """The modules to list: what this package fuses, and all convolutions outside of it."""
    calls: dict[nn.Module, _Call] = {m: _Call("conv2d") for m in model.modules() if isinstance(m, nn.Conv2d)}
    calls |= {m: _Call("attention_gate") for m in model.modules() if isinstance(m, AttentionGate)}
    for module in model.modules():
        if isinstance(module, BNReLUConv2d):
            calls[module] = _Call("bn_relu_conv2d", _fusion.why_unfused(module.bn, module.conv))
            if not calls[module].why:
                calls.pop(module.conv, None)
        elif isinstance(module, BNReLU):
            calls[module] = _Call("bn_relu", _fusion.why_unfused(module.bn))
        elif isinstance(module, AttentionModule) and module.gate in calls:
            calls[module.gate] = _Call("attention_gate", module.why_gate_apart, module.gate_conv)
        for name in getattr(module, "with_relu", ()):
            if (bn := getattr(module, name)) is not None:
                calls[bn] = _Call("bn_relu", _fusion.why_unfused(bn))
    return calls


def _described(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"


def _paths(call: _Call, module: Any, x: Tensor, taken: dict[nn.Module, Tensor]) -> dict[str, tuple[str, str]]:
    """What each pass of the op runs on, and why."""
    if call.op == "conv2d":
        return plain_paths(module, x)
    if missing := _backend.why_plain(x.device.type):
        return dict.fromkeys(PASSES, (PLAIN, missing))
    if call.op == "attention_gate" and module.why_plain:
        return dict.fromkeys(("forward", "dgrad"), (PLAIN, f"{module.why_plain}: runs as written"))
    if call.op == "attention_gate":
        if call.conv is not None and not _fusion.why_watched(x):
            return {"forward": _gate_path(module, x, call.conv, taken[call.conv]), "dgrad": (FUSED, "")}
        why = call.why or (call.conv and _fusion.why_watched(x))
        return {"forward": (FUSED, f"the convolution before it apart: {why}" if why else ""), "dgrad": (FUSED, "")}
    if why := call.why or _fusion.why_watched(x):
        return dict.fromkeys(PASSES, (PLAIN, f"{why}: runs as written"))
    if call.op == "bn_relu_conv2d":
        return _conv_paths(module, x)
    kernels: Any = _backend._C
    if x.is_cuda:
        passes = zip(("forward", "dgrad"), kernels.explain_bn_relu(x, gpu_paths(x)), strict=True)
        return {one: (FUSED, joined("" if held else f"streamed: {why}", source)) for one, (held, why, source) in passes}
    return {"forward": (FUSED, ""), "dgrad": (FUSED, "")}


def _conv_paths(module: BNReLUConv2d, x: Tensor) -> dict[str, tuple[str, str]]:
    conv, device = module.conv, x.device.type
    if torch.is_autocast_enabled(device) and x.dtype not in (torch.get_autocast_dtype(device), torch.float64):
        why = f"x is wider than autocast's {torch.get_autocast_dtype(device)}: normalised as it is, rounded once"
        return dict.fromkeys(PASSES, (LIBRARY, why))
    return fused_paths(conv, x)


def _gate_path(gate: Any, trunk: Tensor, conv: nn.Conv2d, x: Tensor) -> tuple[str, str]:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if trunk.dtype != dtype:
        return FUSED, "the convolution before it apart: trunk is wider"
    kernels: Any = _backend._C
    both, why, source = kernels.explain_conv_gate(
        trunk, x.to(dtype), conv.weight.to(dtype), gate.scale_factor, gpu_paths(x)
    )
    return FUSED, joined(f"{'with' if both else 'without'} the convolution before it: {why}", source)
