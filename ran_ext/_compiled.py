"""Fuses BN-ReLU-convolution in the graphs that ``torch.compile`` hands to Inductor.

A normalisation cannot leave its value unwritten while Dynamo traces it. So a network is traced as it is written, and
this pass puts the fused ops in before autograd and Inductor see the graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from . import _backend
from ._paths import paths
from ._taken import pair
from .ops.conv2d import has_fast_3x3

#: Whether the normalisations of modules of a class are fused.
Takes = Callable[[type], bool]

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_NORM = {
    "input": None,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}
_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_DROPOUT = {"input": None, "p": 0.5, "training": True, "inplace": False}
#: Functions that write to their first argument, beside those whose name ends in an underscore.
_WRITERS = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
#: How the names of functions begin that change a mode, of autograd or autocast.
_SWITCHES = ("_set_", "_enter_", "_exit_")


def backend(
    module: GraphModule, inputs: list[Any], mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """``torch.compile(model, backend="ran_ext")``: Inductor, with the fused ops in any network, converted or not.

    Args:
        module, inputs: as Dynamo calls a backend.
        mode, options: those of ``torch.compile``, for Inductor.
    """
    from torch import _inductor
    from torch._inductor.compile_fx import compile_fx

    fuse(module.graph, lambda kind: True)
    fast_convolutions(module.graph)
    module.recompile()
    patches = {**(_inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(module, inputs, config_patches=patches)


#: What :func:`install` put into Inductor's configuration.
_installed: Any = None


def install(takes: Takes) -> None:
    """Make Inductor fuse what ``takes`` names in every graph, behind the pass that is set, if there is one.

    Called while Dynamo traces: a process that compiles nothing does not import Inductor.
    """
    global _installed
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Fusing(CustomGraphPass):
        def __init__(self, before: Any):
            self.before = before

        def __call__(self, graph: Graph) -> None:
            if self.before is not None:
                self.before(graph)
            fuse(graph, takes)

        def uuid(self) -> Any:
            """For Inductor's cache; None where nothing is known of the pass before: then nothing is cached."""
            before = self.before.uuid() if isinstance(self.before, CustomGraphPass) else self.before
            return None if callable(before) else ("ran_ext", _backend.get_backend(), before)

    if _installed is None or config.pre_grad_custom_pass is not _installed:
        _installed = config.pre_grad_custom_pass = Fusing(config.pre_grad_custom_pass)


def outcomes(network: nn.Module, inputs: Sequence[Tensor], takes: Takes) -> list[tuple[str, str]]:
    """What :func:`fuse` says of the graphs of ``network``, which runs once, without Inductor."""
    found = []

    def note(module: GraphModule, inputs: list[Any]) -> GraphModule:
        found.extend(fuse(module.graph, takes))
        module.recompile()
        return module

    torch.compile(network, backend=note)(*inputs)
    return found


def fuse(graph: Graph, takes: Takes) -> list[tuple[str, str]]:
    """Put the fused op where convolutions, and nothing else, take ReLU of a batch normalisation.

    Returns:
        For each normalisation the name of its module, and why it is left to Inductor; "" where it is not.
    """
    for node in list(graph.nodes):  # what Dynamo asked of a tensor, for its guards
        if node.target is getattr and not node.users:
            graph.erase_node(node)
    norms = [node for node in graph.nodes if node.target is F.batch_norm and takes(_module(node)[1])]
    return [(_module(norm)[0], _fuse(graph, norm)) for norm in norms]


def fast_convolutions(graph: Graph) -> None:
    """Put :func:`ran_ext.ops.conv2d` in place of 3x3 convolutions of channels_last weights."""
    for node in list(graph.nodes):
        x = _fake(node.args[0]) if node.target in (torch.conv2d, F.conv2d) and node.args else None
        if x is None or why_not(x):
            continue
        given = _arguments(node, _CONV)
        weight = _fake(given["weight"])
        conv = _convolution(node, given["input"])
        if conv is None or weight is None or not weight.is_contiguous(memory_format=torch.channels_last):
            continue
        if has_fast_3x3(weight.shape, conv.stride, conv.padding):
            with graph.inserting_before(node):
                x_last = graph.call_method("contiguous", (given["input"],), {"memory_format": torch.channels_last})
                out = graph.call_function(
                    torch.ops.ran_ext.conv2d.default,
                    (x_last, conv.weight, conv.bias, conv.stride, conv.padding, paths(x)),
                )
            _replace(graph, node, out)


def why_not(x: Any) -> str:
    """Why the ops on a tensor like the fake ``x`` are left to Inductor; "" where they are not."""
    if why := _backend.why_plain(x.device.type):
        return why
    if x.device.type != "cpu":
        return "on a GPU Inductor has kernels of its own"
    return "" if x.dim() == 4 and x.is_floating_point() else f"its input is {list(x.shape)} {x.dtype}"


def _fuse(graph: Graph, norm: Node) -> str:
    """Fuse what follows ``norm``; why not, where it cannot be."""
    given = _arguments(norm, _NORM)
    x = _fake(given["input"])
    if x is None:
        return "nothing is known of its input"
    if why := why_not(x):
        return why
    relu = next(iter(norm.users)) if len(norm.users) == 1 else None
    if relu is None or relu.target not in _RELUS:
        return "something else than one ReLU takes its value"
    convs, through = _convolutions(relu)
    if not convs:
        return "something else than convolutions, neither grouped nor dilated, takes its value past ReLU"
    if _changes(norm, {relu, *through}, {conv.node for conv in convs}):
        return "something is changed in place, or a mode, between it and a convolution"
    statistics = _statistics(graph, norm, given, once=len(convs) > 1)
    for conv in convs:
        with graph.inserting_before(conv.node):
            all_of_it = graph.call_function(
                torch.ops.ran_ext.bn_relu_conv2d.default,
                (given["input"], conv.weight, conv.bias),
                {
                    "bn_weight": given["weight"],
                    "bn_bias": given["bias"],
                    **statistics,
                    "eps": given["eps"],
                    "stride": conv.stride,
                    "padding": conv.padding,
                    "paths": paths(x) if conv.paths is None else conv.paths,
                },
            )
            out = graph.call_function(operator.getitem, (all_of_it, 0))
        _replace(graph, conv.node, out)
    for node in (*reversed(through), relu, norm):
        graph.erase_node(node)
    return ""


def _replace(graph: Graph, node: Node, out: Node) -> None:
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _statistics(graph: Graph, norm: Node, given: dict[str, Any], once: bool) -> dict[str, Any]:
    """Those that the op is given; ``once``: the batch's are taken before, for there are several convolutions."""
    running = [t for t in (given["running_mean"], given["running_var"]) if t is not None]
    if not given["training"] and running:
        return {"running": [], "mean": running[0], "var": running[1]}
    if not once:
        return {"running": running, "momentum": given["momentum"]}
    with graph.inserting_before(norm):
        detached = graph.call_method("detach", (given["input"],))
        both = graph.call_function(torch.ops.ran_ext.batch_norm_stats.default, (detached, running, given["momentum"]))
        mean, var = (graph.call_function(operator.getitem, (both, index)) for index in range(2))
    return {"running": [], "mean": mean, "var": var, "batch_stats": True}


class _Convolution(NamedTuple):
    """``paths`` None: those that are chosen now."""

    node: Node
    weight: Any
    bias: Any
    stride: tuple[int, int]
    padding: tuple[int, int]
    paths: Any = None


def _convolutions(x: Node) -> tuple[list[_Convolution], list[Node]]:
    """Those that take the value of ``x``, none where anything else takes it too; and what they take it through."""
    found, through = [], []
    for user in x.users:
        if _changes_nothing(user):
            behind, more = _convolutions(user)
            through += [user, *more]
        else:
            conv = _convolution(user, x)
            behind = [] if conv is None else [conv]
        if not behind:
            return [], []
        found += behind
    return found, through


def _changes_nothing(node: Node) -> bool:
    """Whether it is another memory format, or a dropout that drops nothing."""
    if node.target in (F.dropout, F.dropout2d):
        given = _arguments(node, _DROPOUT)
        return given["p"] == 0 or not given["training"]
    return node.target == "contiguous"


def _convolution(node: Node, x: Node) -> _Convolution | None:
    """That of ``x``, if the fused op has it."""
    if node.target in (torch.ops.ran_ext.conv2d, torch.ops.ran_ext.conv2d.default) and node.args[0] is x:
        return _Convolution(node, *node.args[1:])  # type: ignore[arg-type]
    if node.target not in (torch.conv2d, F.conv2d):
        return None
    given = _arguments(node, _CONV)
    named = isinstance(given["padding"], str)
    if given["input"] is not x or given["groups"] != 1 or pair(given["dilation"]) != (1, 1) or named:
        return None
    return _Convolution(node, given["weight"], given["bias"], pair(given["stride"]), pair(given["padding"]))


def _arguments(node: Node, defaults: dict[str, Any]) -> dict[str, Any]:
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def _fake(node: Any) -> Any:
    """The fake tensor that Dynamo left at a node, if it did."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _module(node: Node) -> tuple[str, type]:
    """Name and class of the innermost module whose forward pass made the node."""
    name, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", object)}).values()))
    return str(name).partition(".")[2], kind if isinstance(kind, type) else object


def _changes(norm: Node, own: set[Node], convs: set[Node]) -> bool:
    """Whether a node in between may write to the normalisation's input, or changes what both of them run under.

    The fused op reads the input, and is differentiated, where the convolution stands. What its ``own`` users write to
    is nobody else's.
    """
    node = norm
    while convs := convs - {node}:
        node = node.next
        if node not in own and _writes_or_switches(node):
            return True
    return False


def _writes_or_switches(node: Node) -> bool:
    """Whether it may write to a tensor, or changes a mode such as ``no_grad``; true where that is unknown."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else getattr(target, "__name__", "_")
    if name.startswith(_SWITCHES) or name.endswith("_") or name in _WRITERS or "out" in node.kwargs:
        return True
    try:
        names = list(inspect.signature(target).parameters) if callable(target) else []
    except ValueError:  # of a function in C, which has no such argument
        names = []
    return bool(_arguments(node, dict.fromkeys(names)).get("inplace"))
