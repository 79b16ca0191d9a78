"""BN-ReLU-convolution fused in the graphs of ``torch.compile``."""

import copy
from collections import Counter

import pytest
import torch
from small_networks import assert_same, build, head, images, pair, step
from torch import nn
from torch.nn import functional as F

import ran_ext
from ran_ext import _compiled, convert
from ran_ext._compare import bytes_kept
from ran_ext._converted import defers

pytestmark = pytest.mark.skipif(ran_ext._backend._C is None, reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch._inductor.config.pre_grad_custom_pass = None


def noting(found, takes=defers):
    """A backend that fuses, keeps what became of each normalisation, and runs the graph as it is."""

    def compiler(module, inputs):
        found.append((module, _compiled.fuse(module.graph, takes)))
        module.graph.lint()
        module.recompile()
        return module

    return compiler


def fused(network, x, **options):
    """The network compiled, and the targets in its one graph after a step."""
    found = []
    compiled = torch.compile(network, backend=noting(found), fullgraph=True, **options)
    step(compiled, x)
    (graph, outcomes), *_ = found
    return compiled, Counter(str(node.target) for node in graph.graph.nodes), dict(outcomes)


FUSED, STATISTICS = "ran_ext.bn_relu_conv2d.default", "ran_ext.batch_norm_stats.default"


@pytest.mark.parametrize(
    ("name", "convolutions", "statistics"),
    [
        ("preact", 5, 1),  # the second unit's first normalisation feeds two
        ("postact", 2, 0),
        ("dense", 3, 0),
        ("without affine", 1, 0),
        ("without tracking", 1, 0),
        ("normalised twice", 1, 0),
        ("no dropout", 1, 0),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_are_as_written(name, convolutions, statistics, training):
    plain, ours = pair(name)
    plain.train(training), ours.train(training)
    compiled, targets, _ = fused(ours, images())
    assert (targets[FUSED], targets[STATISTICS]) == (convolutions, statistics if training else 0)
    step(plain, images())
    for seed in range(3):
        assert_same(step(plain, images(seed=seed)), step(compiled, images(seed=seed)))
    assert_same(list(plain.state_dict().values()), list(ours.state_dict().values()))


@pytest.mark.parametrize("name", ["mobile", "silu", "gelu", "same", "dropout", "ends in a normalisation", "reflected"])
def test_what_the_op_has_not_is_left_to_inductor(name):
    plain, ours = pair(name)
    torch.manual_seed(3)
    compiled, targets, outcomes = fused(ours, images())
    assert targets[FUSED] == 0
    assert all(outcomes.values())
    torch.manual_seed(3)
    step(plain, images())
    for network in (plain, compiled):
        torch.manual_seed(4)
        network.found = step(network, images())
    assert_same(plain.found, compiled.found)


class Changed(nn.Module):
    """Something happens between ReLU and the convolution."""

    def __init__(self, act):
        super().__init__()
        self.bn, self.conv, self.act = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1), act

    def forward(self, x):
        x = x * 1  # ours to change
        return self.conv(self.act(x, F.relu(self.bn(x))))


def _written_through_a_view(x, a):
    x[:, 0].mul_(2)
    return a


def _written(x, a):
    x += 1
    return a


def _written_by_an_activation(x, a):
    F.relu(x, True)
    return a


@torch.library.custom_op("ran_ext_tests::double_in_place", mutates_args={"x"})
def _double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


def _written_by_an_op(x, a):
    torch.ops.ran_ext_tests.double_in_place(x)
    return a


WRITERS = [_written, _written_through_a_view, _written_by_an_activation, _written_by_an_op]


@pytest.mark.parametrize("act", WRITERS, ids=["itself", "a view", "an activation", "an op"])
def test_an_input_that_is_changed_in_between_is_not_fused(act):
    """Without gradients: with them torch refuses to change what a normalisation keeps."""
    found, plain = [], head(Changed(act)).double().eval()
    x = images()
    with torch.no_grad():
        expected = plain(x)
        ours = torch.compile(convert(copy.deepcopy(plain)), backend=noting(found))
        torch.testing.assert_close(ours(x), expected)
    assert found[0][1] == [("1.bn", "something is changed in place, or a mode, between it and a convolution")]


class Frozen(nn.Module):
    """A normalisation that takes no gradient, before a convolution that does."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        with torch.no_grad():
            a = F.relu(self.bn(x))
        return self.conv(a)


def test_a_normalisation_outside_of_the_convolutions_grad_mode_is_not_fused():
    plain = head(Frozen()).double()
    step(plain, images())
    compiled, targets, outcomes = fused(convert(copy.deepcopy(plain)), images())
    assert targets[FUSED] == 0
    assert outcomes == {"1.bn": "something is changed in place, or a mode, between it and a convolution"}
    step(plain, images())
    for one, other in zip(step(plain, images())[2:], step(compiled, images())[2:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_value_that_is_used_elsewhere_too_is_not_fused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            a = F.relu(self.bn(x))
            return self.conv(a) + a

    plain = head(Twice()).double()
    step(plain, images())
    compiled, targets, outcomes = fused(convert(copy.deepcopy(plain)), images())
    assert (targets[FUSED], list(outcomes)) == (0, ["1.bn"])
    step(plain, images())
    assert_same(step(plain, images()), step(compiled, images()))


def test_only_converted_modules_are_fused():
    network = build("preact")
    convert(network[1])
    _, targets, outcomes = fused(network, images())
    assert set(outcomes) == {"1.bn1", "1.bn2"}
    assert targets[FUSED] == 2


def test_sizes_may_be_dynamic_and_autocast_on():
    plain, ours = pair("preact", torch.float32)
    compiled, targets, _ = fused(ours, images(torch.float32), dynamic=True)
    assert targets[FUSED] == 5
    x = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = compiled(x[:1]), plain(x[:1])
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_another_backend_compiles_again():
    _, ours = pair("preact", torch.float32)
    found = []
    compiled = torch.compile(ours, backend=noting(found))
    x = images(torch.float32)
    expected = compiled(x)
    with ran_ext.set_backend("reference"):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
    assert [set(dict(outcomes).values()) for _, outcomes in found] == [
        {"", "something else than convolutions, neither grouped nor dilated, takes its value past ReLU"},
        {"the reference backend was chosen: ran_ext.set_backend('auto') takes the kernels"},
    ]


def small():
    network = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)).to(memory_format=torch.channels_last)
    return network, torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)


def assert_trains_in_half_the_memory(plain, compiled, x):
    for one, other in zip(step(plain, x), step(compiled, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert bytes_kept(compiled, [x]) < 0.6 * bytes_kept(plain, [x])


def test_inductor_fuses_converted_networks():
    """And runs a pass that was set before."""
    plain, x = small()
    seen = []
    torch._inductor.config.pre_grad_custom_pass = lambda graph: seen.append(graph)
    compiled = torch.compile(convert(copy.deepcopy(plain)), fullgraph=True)
    assert_trains_in_half_the_memory(plain, compiled, x)
    assert seen


def test_the_backend_fuses_any_network():
    plain, x = small()
    compiled = torch.compile(copy.deepcopy(plain), backend="ran_ext", options={"epilogue_fusion": False})
    assert_trains_in_half_the_memory(plain, compiled, x)


def test_plain_convolutions_of_any_network():
    """With channels_last weights: others' results would get another memory format than the program knows."""
    network = nn.Sequential(*(nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16)), nn.Conv2d(16, 16, 3)).double()
    x = images()
    graph = torch.fx.symbolic_trace(network)
    values = []

    def note(module, inputs):
        _compiled.fast_convolutions(module.graph)
        module.graph.lint()
        module.recompile()
        values.append([str(node.target) for node in module.graph.nodes].count("ran_ext.conv2d.default"))
        return module

    for layout in (torch.contiguous_format, torch.channels_last):
        torch.compiler.reset()
        network.to(memory_format=layout)
        torch.testing.assert_close(torch.compile(network, backend=note)(x), graph(x))
    assert values == [0, 1]  # 3 channels, and no padding: the library's


def test_explain_says_what_the_graphs_leave(capsys):
    _, ours = pair("preact", torch.float32)
    ran_ext.explain(torch.compile(ours), images(torch.float32))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "under torch.compile: 4 of 5 batch normalisations fused with the convolutions behind them",
        "left to Inductor: 3: something else than convolutions, neither grouped nor dilated, takes its value past ReLU",
    ]
