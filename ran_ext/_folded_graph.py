"""Networks of anybody, folded: a forward pass is traced, and each convolution takes in what stands around it."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from ._folded_conv import Evaluation, folded, is_bn, is_conv, is_known, with_relu
from .nn import BNReLU, BNReLUConv2d

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: What does nothing in evaluation.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_CALLS = ("call_function", "call_method")
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_ADD = (operator.add, torch.add, "add")
_ADD_IN_PLACE = (operator.iadd, "add_")
#: Functions that write to none of their arguments, as may stand between a convolution and an addition that it takes in.
_READS = (operator.add, operator.mul, operator.getitem, torch.add, torch.mul, torch.cat, torch.flatten, torch.sigmoid)


class FoldedGraph(Evaluation):
    """The forward pass of a module as it was traced, of one argument, in evaluation.

    Args:
        traced: what it is.
        channels_last: put images into that memory format.
    """

    def __init__(self, traced: fx.GraphModule, channels_last: bool):
        super().__init__()
        self.traced, self.channels_last = traced, channels_last
        #: A floating-point argument is cast to it.
        self.dtype: torch.dtype | None = None
        self.eval()

    def fold(self, dtype: torch.dtype) -> int:
        """Fold what can be, in place; how many convolutions and normalisations that were."""
        self.dtype = dtype
        count = fold_graph(self.traced, dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.traced.to(memory_format=layout)  # type: ignore[call-overload]
        self.eval()
        return count

    def forward(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x if self.dtype is None else x.to(self.dtype)
            x = x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x
        return self.traced.forward(x)  # a call would also print what it raises


def trace_parts(model: nn.Module, images: Tensor | None, expected: Any) -> nn.Module:
    """``model`` with its forward pass traced: whole, or, where that does not work, in parts; changed in place.

    A trace misses what Python decides by the values in a forward pass. So what was traced is held to the model's own
    outputs for ``images``, which are ``expected``, and stays as written where they differ; without images only a plain
    ``nn.Sequential`` is traced, whose forward pass is known.
    """
    root = nn.Module()
    root.model = model
    done: dict[nn.Module, nn.Module] = {}

    def serves(part: FoldedGraph, parent: nn.Module, name: str) -> bool:
        before = parent._modules[name]
        parent._modules[name] = part
        try:
            if images is None or same(root.model(images), expected):  # type: ignore[operator]
                return True
        except Exception:  # whatever a network of anybody's raises on images of the other memory format
            pass
        parent._modules[name] = before
        return False

    def visit(parent: nn.Module, name: str, module: nn.Module) -> None:
        if module in done:
            parent._modules[name] = done[module]
            return
        done[module] = module
        if _is_leaf(module):
            return
        if (images is not None or _is_sequential(module)) and (graph := _trace(module)) is not None:
            for channels_last in [False] if images is None else [True, False]:
                if serves(part := FoldedGraph(graph, channels_last), parent, name):
                    done[module] = part
                    return
        for inner, child in list(module._modules.items()):
            if child is not None:
                visit(module, inner, child)

    visit(root, "model", model)
    return root.model


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of ``module`` stays a call: its kind is known, or something looks on."""
    if module._forward_hooks or module._forward_pre_hooks or isinstance(module, torch.jit.ScriptModule):
        return True
    return any(
        kind.__module__.startswith(("torch.nn.modules.", "ran_ext.")) and kind not in _CONTAINERS
        for kind in type(module).__mro__
    )


def _is_sequential(module: nn.Module) -> bool:
    """Whether ``module`` calls known modules one after the other, and does nothing else."""
    if type(module) is not nn.Sequential or not is_known(module, nn.Sequential):
        return False
    return all(child is not None and (_is_leaf(child) or _is_sequential(child)) for child in module._modules.values())


def _trace(module: nn.Module) -> fx.GraphModule | None:
    """The forward pass of ``module``; None where it cannot be traced, or has nothing to fold."""
    if type(module) in (nn.Module, nn.ModuleList, nn.ModuleDict):  # which cannot be called
        return None
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module, _defaults(module)), type(module).__name__)
    except Exception:  # a forward pass of anybody's, run on what are no tensors
        return None
    for node in list(graph.graph.nodes):
        if type(inner := _called(node, graph)) in _NOTHING and is_known(inner, type(inner)):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        _expand(node, graph)
    graph.recompile()
    return graph if any(is_conv(_called(node, graph)) for node in graph.graph.nodes) else None


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Of a forward pass all arguments but the first; raises where a second one is needed."""
    _, *others = inspect.signature(module.forward).parameters.values()
    others = [other for other in others if other.kind not in (other.VAR_POSITIONAL, other.VAR_KEYWORD)]
    if any(other.default is other.empty for other in others):
        raise TypeError("more than one argument")
    return {other.name: other.default for other in others}


def same(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same up to the order of sums."""
    (ours, structure), (theirs, wanted) = tree_flatten(found), tree_flatten(expected)
    return structure == wanted and all(_close(*pair) for pair in zip(ours, theirs, strict=True))


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    return differ_by(one, other) <= 64 * torch.finfo(other.dtype).eps


def differ_by(one: Tensor, other: Tensor) -> float:
    """The largest difference, over the largest number of ``other``; infinite where NaN stand at other places."""
    if not torch.equal(one.isnan(), other.isnan()):
        return math.inf
    one, other = (t.double().nan_to_num(0.0, 1e300, -1e300) for t in (one, other))
    return float((one - other).abs().max() / other.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def fold_graph(graph: fx.GraphModule, dtype: torch.dtype) -> int:
    """Fold in a traced forward pass, in place; how many convolutions and normalisations that were."""
    nodes = graph.graph.nodes
    count = 0
    for node in list(nodes):
        if is_conv(_called(node, graph)):
            count += 1
            _fold_convolution(node, graph, dtype, f"folded_conv{count}")
    for node in list(nodes):
        if is_bn(bn := _called(node, graph)) and (relu := _following(node)) and _is_relu(relu, graph):
            count += 1
            _put(graph, f"folded_bn_relu{count}", with_relu(bn, dtype), [node, relu], node.args, at=node)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return count


def _expand(node: fx.Node, graph: fx.GraphModule) -> None:
    """Put normalisation, ReLU and convolution in the place of one of this package's modules, where one of them may
    join a neighbour; by itself the module is the faster one.
    """
    module, following = _called(node, graph), _following(node)
    if not (is_known(module, BNReLU) or is_known(module, BNReLUConv2d)) or not is_bn(module.bn):
        return
    source: Any = node.args[0]
    joins = _following(source) is node and _ends_with_conv(_called(source, graph))
    parts = ["bn"]
    if is_known(module, BNReLUConv2d):
        joins = joins or (following is not None and _begins_with_bn(_called(following, graph)))
        joins = joins and is_conv(module.conv)
        parts.append("conv")
    if not joins:
        return
    value: Any = source
    with graph.graph.inserting_before(node):
        for part in parts:
            value = graph.graph.call_module(f"{node.target}.{part}", (value,))
            value = graph.graph.call_function(F.relu, (value,)) if part == "bn" else value
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def _ends_with_conv(module: nn.Module | None) -> bool:
    return is_conv(module.conv if is_known(module, BNReLUConv2d) else module)


def _begins_with_bn(module: nn.Module | None) -> bool:
    return is_bn(module.bn if is_known(module, BNReLU) or is_known(module, BNReLUConv2d) else module)


def _called(node: fx.Node, graph: fx.GraphModule) -> Any:
    """The module that ``node`` calls with one value and nothing else; None where it does not."""
    one = node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
    return graph.get_submodule(node.target) if one else None  # type: ignore[arg-type]


def _following(node: fx.Node) -> fx.Node | None:
    """The one use of the value of ``node``, where there is one."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _is_relu(node: fx.Node, graph: fx.GraphModule) -> bool:
    if node.op not in _CALLS:
        return is_known(_called(node, graph), nn.ReLU)
    return node.target in _RELU and len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}


def _addend(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``value``, where it does that and writes to nothing else."""
    if node.op not in _CALLS or node.target not in (*_ADD, *_ADD_IN_PLACE) or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if first is value:
        return second
    return first if node.target in _ADD else None


def _fold_convolution(node: Any, graph: fx.GraphModule, dtype: torch.dtype, name: str) -> None:
    """Put a :class:`FoldedConv2d` in the place of ``node`` and of what joins it: BN, an addition, ReLU."""
    conv, source = _called(node, graph), node.args[0]
    chain, args, before, bn, at = [node], node.args, None, None, node
    if _following(source) is node and is_bn(_called(source, graph)) and _takes_shift(conv):
        before, args, at = _called(source, graph), source.args, source
        chain.insert(0, at)
    following: Any = _following(node)
    if following is not None and is_bn(_called(following, graph)):
        bn = _called(following, graph)
        chain.append(following)
        following = _following(following)
    addend = None if following is None else _addend(following, chain[-1])
    # With an addition the convolution is done later: nothing may write to its input meanwhile.
    if addend is not None and all(_only_reads(other, graph) for other in _between(at, following)):
        args, at = (*args, addend), following
        chain.append(following)
        following = _following(following)
    relu = following is not None and _is_relu(following, graph)
    if relu:
        chain.append(following)
    _put(graph, name, folded(conv, bn, relu, dtype, before), chain, args, at)


def _takes_shift(conv: nn.Conv2d) -> bool:
    """Whether a normalisation before ``conv`` can join it: zeros of the padding would not be shifted."""
    return conv.padding == (0, 0) and conv.groups == 1


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not last:
        yield node
        node = node.next


def _only_reads(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether ``node`` writes to none of its arguments."""
    if node.op == "call_module":
        module = graph.get_submodule(node.target)  # type: ignore[arg-type]
        known = type(module).__module__.startswith(("torch.nn.modules.", "ran_ext.")) and is_known(module, type(module))
        return known and not getattr(module, "inplace", False)
    return node.op in ("placeholder", "get_attr") or (node.target in _READS and "out" not in node.kwargs)


def _put(
    graph: fx.GraphModule, name: str, module: nn.Module, chain: list[fx.Node], args: tuple[Any, ...], at: fx.Node
) -> None:
    """A call of ``module``, where ``at`` is, in the place of ``chain``."""
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(at):
        call = graph.graph.call_module(name, args)
    chain[-1].replace_all_uses_with(call)
    for node in reversed(chain):
        graph.graph.erase_node(node)
