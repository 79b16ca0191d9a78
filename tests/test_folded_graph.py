"""Networks of anybody folded: what joins a convolution, what must not, and what a trace would get wrong."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ran_ext import _folded_graph, convert, fold_for_inference
from ran_ext.inference import FoldedConv2d, FoldedGraph
from ran_ext.nn import BNReLU

IMAGES = (2, 16, 12, 12)


def trained(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.track_running_stats:
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, -1.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return module.eval()


def count(module, kind):
    return sum(type(part) is kind for part in module.modules())


def check(module, size=IMAGES, close=1e-4):
    """The folded network in float32, after its values have been compared, in float64 too."""
    trained(module)
    for dtype, error in ((torch.float64, 1e-10), (torch.float32, close)):
        twin, x = copy.deepcopy(module).to(dtype), torch.randn(size, dtype=dtype)
        folded = fold_for_inference(twin, dtype, x)
        for layout in (torch.contiguous_format, torch.channels_last):
            for images in (x, torch.randn(3, *size[1:], dtype=dtype)):
                images = images.to(memory_format=layout)
                with torch.no_grad():
                    before = images.clone()
                    assert_close(folded(images), twin(images), rtol=error, atol=error)
                    assert_close(images, before, rtol=0, atol=0)
    return folded


class Block(nn.Module):
    """As torchvision writes a residual block: one ReLU in place, an addition in place, a short cut of its own."""

    def __init__(self, into, out, stride=1, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, groups=groups, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(16, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.layers = nn.Sequential(*(blocks or (Block(16, 16), Block(16, 32, 2), Block(32, 32, groups=4))))
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1), 1))


class Holder(nn.Module):
    """A forward pass given as a function of its convolutions and normalisations."""

    def __init__(self, forward, padding=1, **convolution):
        super().__init__()
        self.conv, self.other = nn.Conv2d(16, 16, 3, padding=padding, **convolution), nn.Conv2d(16, 16, 1)
        self.bn, self.bn2, self.function = nn.BatchNorm2d(16), nn.BatchNorm2d(16), forward

    def forward(self, x):
        return self.function(self, x)


def only(module, kind):
    [found] = [part for part in module.modules() if type(part) is kind]
    return found


def test_a_residual_network_folds_whole():
    folded = check(ResNet())
    assert count(folded, FoldedConv2d) == 8
    assert count(folded, nn.BatchNorm2d) == count(folded, nn.ReLU) == 0
    names = [node.name for node in folded.traced.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "add" in name or "relu" in name]  # both are done with a convolution


def test_a_converted_network_folds_as_the_plain_one():
    network, x = trained(ResNet()), torch.randn(IMAGES)
    expected = network(x)
    assert_close(fold_for_inference(convert(network), images=x)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_plain_sequential_needs_no_images():
    folded = fold_for_inference(trained(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU())))
    assert only(folded, FoldedConv2d).relu
    x = torch.randn(IMAGES)
    assert folded(x).is_contiguous()  # the memory format stays: what is around it was not asked
    with pytest.raises(ValueError, match="give images, a batch that the model takes"):
        fold_for_inference(Block(16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    network, x = trained(ResNet()), torch.randn(IMAGES)
    folded = fold_for_inference(network, dtype, x)
    assert folded(x).dtype == dtype
    assert_close(folded(x).float(), network(x), rtol=0.1, atol=0.1)


def test_normalisations_before_a_convolution():
    folded = check(Holder(lambda m, x: m.other(F.relu(m.bn2(m.conv(F.relu(m.bn(x))))))))  # as in a DenseNet
    assert count(folded, BNReLU) == 1
    assert only(folded, BNReLU).bn.weight.dtype == torch.float32
    assert count(folded, FoldedConv2d) == 2
    joined = check(Holder(lambda m, x: m.bn2(m.other(m.bn(x)))))  # 1x1, so without padding: both join
    assert count(joined, nn.BatchNorm2d) == 0
    padded = check(Holder(lambda m, x: m.conv(m.bn(x))))  # the zeros of the padding are not shifted
    assert count(padded, nn.BatchNorm2d) == 1


@pytest.mark.parametrize("options", [{"groups": 16}, {"groups": 4}, {"dilation": 2, "padding": 2}, {"bias": False}])
def test_grouped_and_dilated_convolutions(options):
    folded = check(Holder(lambda m, x: m.bn(m.conv(x)).relu_() + x, **options))
    assert count(folded, nn.BatchNorm2d) == 0


def used_twice(m, x):
    y = m.conv(x)
    return m.bn(y) + y


def bn_used_twice(m, x):
    return m.bn(m.conv(x)) + m.bn(m.other(x))


def conv_used_twice(m, x):
    return m.bn2(m.conv(F.relu(m.bn(m.conv(x)))))


def returned_as_well(m, x):
    y = m.bn(m.conv(x))
    return y, F.relu(y)


def added_to_itself(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + y)


def scaled_addition(m, x):
    return torch.add(m.bn(m.conv(x)), x, alpha=2)


def scaled_method(m, x):
    return m.bn(m.conv(x)).add(x, alpha=0.5)


def constant_addition(m, x):
    return (m.bn(m.conv(x)) + 1).relu()


def broadcast_addition(m, x):
    return torch.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True))


def input_written_meanwhile(m, x):
    x = x.clone()
    y = m.bn(m.conv(x))
    shortcut = m.other(x.mul_(2))
    return F.relu(y + shortcut)


def input_relu_in_place_meanwhile(m, x):
    x = x.clone()
    y = m.bn(m.conv(x))
    return y + m.other(F.relu(x, inplace=True))


def addend_written_after(m, x):
    other = m.other(x)
    y = m.bn(m.conv(x)) + other
    other.mul_(3)
    return F.relu(y) + other


def relu_of_something_else(m, x):
    return F.relu(x) + m.bn(m.conv(x))


def dropout_between(m, x):
    return F.relu(m.bn(F.dropout(m.conv(x), 0.5, m.training)))


def attribute_called_add(m, x):
    return torch.relu(m.conv(x)) + m.other(m.conv(x))


TRAPS = [used_twice, bn_used_twice, conv_used_twice, returned_as_well, added_to_itself, scaled_addition, scaled_method,
         constant_addition, broadcast_addition, input_written_meanwhile, input_relu_in_place_meanwhile,
         addend_written_after, relu_of_something_else, dropout_between,
         attribute_called_add]  # fmt: skip


@pytest.mark.parametrize("forward", TRAPS, ids=lambda forward: forward.__name__)
def test_values_stay(forward):
    folded = check(Holder(forward))
    assert isinstance(folded, FoldedGraph)


def seen_through_a_view(m, x):
    """A trace takes ``+=`` for ``+``."""
    other = m.other(x)
    view = other.view(-1)
    other += m.bn(m.conv(x))
    return F.relu(other), view.sum()


def test_what_a_trace_gets_wrong_stays_as_written():
    with pytest.raises(ValueError, match="nothing to fold"):
        fold_for_inference(trained(Holder(seen_through_a_view)), images=torch.randn(IMAGES))


class Add(nn.Module):
    def forward(self, x, y):
        return x - y  # not what it is called


def test_modules_called_as_functions_are():
    module = Holder(lambda m, x: torch.relu(m.add(m.bn(m.conv(x)), x)))
    module.add = Add()
    check(module)


def test_what_was_changed_or_is_looked_at_stays():
    seen = []
    module = ResNet()
    module.layers[0].bn1.register_forward_hook(lambda module, args, out: seen.append(out.shape) or -out)
    module.layers[1].register_forward_hook(lambda module, args, out: out + 1)
    folded = check(module)
    assert len(seen) > 10
    assert count(folded, Block) == 1  # the second, as written, so that its hook is called


class Asks(nn.Module):
    """What a trace gets wrong without an error: a Proxy is no tensor."""

    def __init__(self):
        super().__init__()
        self.block = Block(16, 16)

    def forward(self, x):
        return self.block(x) * (2 if isinstance(x, torch.Tensor) else 3)


class Sizes(nn.Module):
    """What cannot be traced: a decision by size."""

    def __init__(self):
        super().__init__()
        self.block, self.asks = Block(16, 16), Asks()

    def forward(self, x):
        return self.asks(self.block(x)) if x.shape[2] > 4 else x


@pytest.mark.parametrize("kind", [Asks, Sizes])
def test_where_the_whole_cannot_be_traced_its_parts_are(kind):
    folded = check(kind())
    assert type(folded) is kind
    assert count(folded, nn.BatchNorm2d) == 0
    with torch.no_grad():
        x = torch.randn(1, 16, 3, 3)
        if kind is Sizes:
            assert folded(x) is x


class Views(nn.Module):
    """Works in one memory format."""

    def __init__(self):
        super().__init__()
        self.features, self.fc = nn.Sequential(nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(400, 3)

    def forward(self, x, scale=None, *more, **others):
        x = self.features(x)
        x = self.fc(x.view(x.size(0), -1))
        return x if scale is None else x * scale


def test_a_network_that_takes_one_memory_format_keeps_it():
    network, x = trained(Views()), torch.randn(IMAGES)
    folded = fold_for_inference(network, images=x)
    assert not folded.channels_last
    with torch.no_grad():
        assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)


def test_tuples_and_dictionaries_are_outputs_too():
    check(Holder(lambda m, x: {"a": m.bn(m.conv(x)), "b": (x, F.relu(m.bn2(m.other(x))))}))


def test_a_module_of_two_arguments_stays_and_its_parts_fold():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(16, 16)

        def forward(self, x, y):
            return self.block(x) + y

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            return self.two(x, x) if len(x.shape) == 4 and bool((x == x).all()) else x

    folded = check(Network())
    assert isinstance(folded.two.block, FoldedGraph)


def test_a_folded_network_stays_in_evaluation_and_can_be_copied():
    network, x = trained(ResNet()), torch.randn(IMAGES)
    folded = fold_for_inference(network, images=x).train()
    with torch.no_grad():
        expected = network(x)
        for other in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(part.training or any(p.requires_grad for p in part.parameters()) for part in folded.modules())
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(folded, backend="eager", fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_wrong_images_are_refused():
    with pytest.raises(TypeError, match="images must be a tensor or None, got list"):
        fold_for_inference(ResNet(), images=[1])
    with pytest.raises(RuntimeError, match="channels"):  # the network's own words
        fold_for_inference(ResNet(), images=torch.randn(1, 3, 12, 12))


@pytest.mark.parametrize("size", [(2, 64, 14, 14), (1, 64, 7, 9)])
def test_residuals_by_winograd(size):
    """The 3x3 kernels add the residual themselves."""
    check(Block(64, 64), size, 1e-3)


def test_a_fold_that_changes_the_outputs_is_not_returned(monkeypatch):
    monkeypatch.setattr(_folded_graph, "_takes_shift", lambda conv: True)
    network = trained(Holder(lambda m, x: m.conv(m.bn(x + 3)), bias=False))
    with pytest.raises(RuntimeError, match=r"off by .* of the largest"):
        fold_for_inference(network, images=torch.randn(IMAGES))
    assert isinstance(fold_for_inference(network, torch.bfloat16, torch.randn(IMAGES)), FoldedGraph)  # not held to it


def test_outputs_are_compared_with_nan_and_infinity():
    x = torch.tensor([1.0, float("inf"), float("nan")])
    assert _folded_graph.same([x, 3, "a"], [x.clone(), 3, "a"])
    for other in (torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([1.0, float("inf"), 1.0]), x[:2], x.double()):
        assert not _folded_graph.same(other, x)
    assert not _folded_graph.same((x,), [x])


class Counts(nn.Module):
    """Takes whole numbers, as they come from a file."""

    def __init__(self):
        super().__init__()
        self.block = Block(16, 16)

    def forward(self, x):
        return self.block(x.long().float() / 255)


def test_images_of_whole_numbers_stay_such():
    network, x = trained(Counts()), torch.randint(256, IMAGES, dtype=torch.uint8)
    folded = fold_for_inference(network, images=x)
    with torch.no_grad():
        assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
