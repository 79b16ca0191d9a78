"""Whole modules under what acts through calls: hooks on units, torch's own wrappers, tracers, compilation."""

import copy
import functools
import importlib.util

import pytest
import torch
import torch.distributed as dist
from plain_twin import PLAIN, assert_same_training, plain_twin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ran_ext import _fusion, explain
from ran_ext._explain import FUSED, layers
from ran_ext._explain import PLAIN as RUNS_PLAIN
from ran_ext.models import ran_compact
from ran_ext.nn import AttentionGate, AttentionModule, BNReLU, BNReLUConv2d, ResidualUnit
from ran_ext.nn.units import _UNITS


def image(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def seen_by_hooks(network: nn.Module, names: list[str], x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Name, input and output of each call of the modules named."""
    seen = []
    for name in names:
        part = network.get_submodule(name)
        part.register_forward_hook(lambda _, args, out, name=name: seen.append((name, args, out)))
    network(x)
    return seen


@pytest.mark.parametrize("names", [["conv1"], ["conv2"], ["conv3"], ["conv1", "conv2", "conv3", "shortcut"]])
@pytest.mark.parametrize("training", [True, False])
def test_a_hook_on_a_unit_sees_what_plain_modules_pass(names, training):
    unit, x = ResidualUnit(8, 12, 4).double().train(training), image(3, 8, 6, 5)
    plain = plain_twin(unit)
    ours, theirs = seen_by_hooks(unit, names, x), seen_by_hooks(plain, names, x)
    assert sorted(name for name, *_ in ours) == sorted(names)
    for name, args, out in theirs:
        [(got_args, got_out)] = [(a, o) for n, a, o in ours if n == name]
        assert type(got_out) is Tensor
        assert len(got_args) == 1
        torch.testing.assert_close((got_args[0], got_out), (args[0], out))


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "shortcut"])
@pytest.mark.parametrize("act", ["hook", "forward", "class", "compiled", "removed"])
def test_what_acts_on_a_unit_acts(name, act):
    torch._dynamo.reset()  # earlier tests used up how often one piece of code may be compiled
    unit = ResidualUnit(8, 12, 4).double()
    plain = plain_twin(unit)
    for network in (unit, plain):
        part = getattr(network, name)
        if act == "hook":
            part.register_forward_hook(lambda _, args, out: out * 2)
        elif act == "forward":
            part.forward = functools.partial(lambda forward, x: forward(x) * 2, part.forward)
        elif act == "class":
            part.__class__ = type(
                "Doubled", (type(part),), {"forward": lambda self, x: super(type(self), self).forward(x) * 2}
            )
        elif act == "compiled":
            part.compile(backend=lambda graph, inputs: lambda *args: tuple(t * 2 for t in graph(*args)))
        else:
            channels = {"conv1": (8, 4), "conv2": (4, 4), "conv3": (4, 12), "shortcut": (8, 12)}[name]
            torch.manual_seed(0)
            setattr(network, name, nn.Conv2d(*channels, 1).double())
    x = image(3, 8, 6, 5)
    torch.testing.assert_close(unit(x), plain(x))
    assert_same_training(unit, plain, x)


@pytest.mark.parametrize("part", ["gate", "mask", "mask.conv1", "mask.conv2"])
def test_what_acts_between_mask_and_gate_acts(part):
    module = AttentionModule(8, 1).double()
    plain = plain_twin(module)
    for network in (module, plain):
        network.get_submodule(part).register_forward_hook(lambda _, args, out: out * 2)
    assert_same_training(module, plain, image(2, 8, 6, 5))


def test_a_parametrised_convolution_stays_in_the_gates_op_and_is_worked_out_once():
    module = AttentionModule(8, 1).double()
    parametrizations.spectral_norm(module.mask.conv2)  # each reading in training is a step of its iteration
    assert module.gate_conv is module.mask.conv2
    assert_same_training(module, plain_twin(module), image(2, 8, 6, 5))


def test_hooks_on_all_modules_see_all_of_them():
    network, x = nn.Sequential(BNReLU(8), ResidualUnit(8, 8, 8), AttentionModule(8, 1)).double(), image(2, 8, 6, 5)
    wanted, calls = plain_twin(network), []
    with torch_module.register_module_forward_hook(lambda module, args, out: calls.append(module)):
        out = network(x)
    assert set(calls) == set(network.modules()) - {m for m in network.modules() if isinstance(m, nn.ModuleList)}
    torch.testing.assert_close(out, wanted(x))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, BNReLUConv2d, AttentionGate])
def test_a_forward_replaced_on_a_class_is_taken(kind, monkeypatch):
    network, x = nn.Sequential(ResidualUnit(8, 8, 8), AttentionModule(8, 1)).double(), image(2, 8, 6, 5)
    plain, forward = plain_twin(network), kind.forward
    original = PLAIN.get(kind, kind).forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: forward(self, *args) * 2)
    if kind in PLAIN:
        monkeypatch.setattr(PLAIN[kind], "forward", lambda self, *args: original(self, *args) * 2)
    torch.testing.assert_close(network(x), plain(x))
    unit = network[0].conv1
    known = _fusion.why_unfused(unit.bn, unit.conv) or _fusion.why_called("conv1", unit, _UNITS)
    assert known == (f"forward of {kind.__name__} was replaced" if kind is not AttentionGate else "")


def test_classes_put_in_torch_nn_before_are_not_taken_for_the_known_ones(monkeypatch):
    """As quantisation toolkits do it: nn.Conv2d is another class from then on."""

    class Quantised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).round()

    monkeypatch.setattr(nn, "Conv2d", Quantised)
    unit = BNReLUConv2d(8, 8, 1)
    out = unit(torch.randn(2, 8, 4, 4))
    assert torch.equal(out, out.round())
    spec = importlib.util.spec_from_file_location("ran_ext._fusion_imported_now", _fusion.__file__)
    imported_now = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported_now)
    assert imported_now.why_unfused(unit.bn, unit.conv) == "conv is a Quantised, not exactly a Conv2d"


def test_a_convolution_compiled_by_itself_runs_compiled():
    unit, x = BNReLUConv2d(8, 8, 1).double(), image(2, 8, 4, 4)
    unit.conv.compile()
    assert _fusion.why_unfused(unit.bn, unit.conv) == "conv was compiled by itself"
    unit.conv._compiled_call_impl = lambda x: x * 3
    torch.testing.assert_close(unit(x), 3 * F.relu(unit.bn(x)))


def test_offloaded_parameters_are_brought_when_the_module_is_called():
    """As libraries offload: on the meta device until a replaced forward brings them."""
    unit, x = BNReLUConv2d(8, 8, 3, padding=1).double(), image(2, 8, 5, 5)
    wanted = unit.conv(F.relu(copy.deepcopy(unit.bn)(x)))
    for module in (unit.bn, unit.conv):
        held, plain = dict(module.state_dict()), type(module).forward

        def brought(x, module=module, held=held, plain=plain):
            module.load_state_dict(held, assign=True)
            return plain(module, x)

        module.to("meta").forward = brought
    torch.testing.assert_close(unit(x), wanted)


def test_lazy_modules_are_initialised():
    unit, x = BNReLUConv2d(8, 12, 1), torch.randn(2, 8, 4, 4)
    unit.bn, unit.conv = nn.LazyBatchNorm2d(), nn.LazyConv2d(12, 1)
    out = unit(x)
    assert out.shape == (2, 12, 4, 4)
    assert _fusion.why_unfused(unit.bn, unit.conv) == ""  # their first call made them ordinary ones
    torch.testing.assert_close(unit(x), out)


@pytest.mark.parametrize(
    "make", [lambda: BNReLUConv2d(8, 8, 3, padding=1), lambda: BNReLU(8), lambda: ResidualUnit(8, 8, 8)]
)
def test_other_tensors_run_as_written(make):
    """On the meta device, as fake tensors, as a subclass, under torch.fx."""
    module, x = make().double(), image(2, 8, 5, 4)
    wanted = plain_twin(module)(x)
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == wanted.shape
    traced = torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(module)))
    torch.testing.assert_close(traced(x), wanted)
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    out = copy.deepcopy(module)(x.as_subclass(Logged))
    assert F.batch_norm in seen
    assert type(out) is Logged
    torch.testing.assert_close(out.as_subclass(Tensor), wanted)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x)).shape == wanted.shape


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, BNReLUConv2d, ResidualUnit])
def test_sharding_each_module_of_a_kind(kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network, x = nn.Sequential(ResidualUnit(8, 8, 8), BNReLUConv2d(8, 4, 1)).double(), image(2, 8, 5, 4)
    plain = plain_twin(network)
    for module in list(network.modules()):
        if isinstance(module, kind):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    network(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, ours), wanted in zip(network.named_parameters(), plain.parameters(), strict=True):
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(grad, wanted.grad, msg=name)


@pytest.mark.parametrize("act", ["nothing", "hook", "parametrised", "forward", "subclass"])
def test_one_graph_without_breaks_or_recompiling(act):
    network, x = nn.Sequential(ResidualUnit(8, 8, 8), BNReLU(8)), torch.randn(2, 8, 5, 4)
    conv = network[0].conv2.conv
    if act == "hook":
        conv.register_forward_hook(lambda _, args, out: out * 2)
    elif act == "parametrised":
        parametrizations.weight_norm(conv)
    elif act == "forward":
        conv.forward = lambda x: F.relu(x)
    elif act == "subclass":
        network[0].conv2.conv = type("Own", (nn.Conv2d,), {"forward": lambda self, x: x * 3})(8, 8, 1)
    plain, graphs = plain_twin(network), []
    compiled = torch.compile(network, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_explain_says_nothing_of_its_own_hooks_and_takes_a_pruned_network():
    network, x = ran_compact(width=0.125), torch.randn(2, 3, 16, 16)
    paths = [layer.paths["forward"] for layer in layers(network, x) if layer.op != "conv2d"]
    assert not any("hook" in why or "written" in why for _, why in paths)
    prune.l1_unstructured(network.stage1[0].conv1.conv, "weight", 0.5)
    network(x)  # from here on the weight is one that cannot be copied
    explain(network, x)
    found = {layer.name: layer.paths["forward"] for layer in layers(network, x)}
    assert found["stage1.0.conv1"] == (RUNS_PLAIN, "a forward pre-hook on conv: runs as written")
    assert found["stage1.0.conv2"][1] != found["stage1.0.conv1"][1]
    assert found["bn1"] == (FUSED, "")


class Recorder(TorchDispatchMode):
    """As counters of operations and selective checkpoints do: it sees every op."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), function]
        return function(*args, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 2 if function is F.conv2d else out


def test_modes_see_pytorchs_own_ops():
    network, x = nn.Sequential(ResidualUnit(8, 8, 8), AttentionModule(8, 1), BNReLU(8)).double(), image(2, 8, 6, 5)
    plain = plain_twin(network)
    with Recorder() as ours:
        network(x)
    with Recorder() as wanted:
        plain(x)
    convolution = torch.ops.aten.convolution.default
    assert ours.seen.count(convolution) == wanted.seen.count(convolution) == 23
    with Doubling():
        torch.testing.assert_close(network(x), plain(x))


def test_a_default_device_leaves_the_modules_fused():
    unit, x = BNReLUConv2d(8, 8, 1), torch.randn(2, 8, 4, 4)
    with torch.device("cpu"):
        assert _fusion.why_watched(x) == ""
        torch.testing.assert_close(unit(x), plain_twin(unit)(x))
    with torch.device("cpu"), Doubling():
        assert _fusion.why_watched(x) == "a TorchFunctionMode is on"
