"""What folds, what is left as written, and what is refused; always the values of the module as written."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from ran_ext import _folded_conv, fold_for_inference, models
from ran_ext.inference import FoldedConv2d, FoldedGraph, FoldedNetwork, FoldedResidualUnit
from ran_ext.nn import AttentionGate, AttentionModule, BNReLU, BNReLUConv2d, ResidualUnit

SIZES = [(1, 1), (2, 7), (9, 8)]


def trained(module):
    """In evaluation mode, with running statistics and scales of its own."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)) and part.running_mean is not None:
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            if part.affine:
                nn.init.uniform_(part.weight, -1.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.2)
    return module.eval()


def count(module, kind):
    return sum(type(part) is kind for part in module.modules())


def check(module, channels, sizes=SIZES):
    """The folded module, after its values have been compared, in float64 and float32 and both memory formats."""
    trained(module)
    for dtype, close in ((torch.float64, {}), (torch.float32, {"rtol": 1e-4, "atol": 1e-4})):
        twin = copy.deepcopy(module).to(dtype)
        folded = fold_for_inference(twin, dtype)
        for size in sizes:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(2, channels, *size, dtype=dtype).to(memory_format=layout)
                with torch.no_grad():
                    assert_close(folded(x), twin(x), **close)
    return folded


@pytest.mark.parametrize("width", [4, 8, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_neighbours_in_a_sequential(width, bias):
    module = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=bias),
        BNReLUConv2d(width, width, 3, padding=1, bias=bias),
        BNReLUConv2d(width, 8, 1, stride=2, bias=bias),
        BNReLU(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    folded = check(module, 3)
    assert count(folded, FoldedConv2d) == 3
    assert count(folded, BNReLU) == 0


def test_the_first_normalisation_stays():
    folded = check(nn.Sequential(BNReLUConv2d(6, 6, 1), nn.Dropout(), BNReLUConv2d(6, 6, 1), BNReLUConv2d(6, 6, 1)), 6)
    assert [count(folded, kind) for kind in (BNReLUConv2d, BNReLU, FoldedConv2d)] == [0, 1, 3]


def test_members_that_moved_cannot_be_called_one_by_one():
    folded = fold_for_inference(nn.Sequential(BNReLUConv2d(6, 6, 1), BNReLUConv2d(6, 6, 1)))
    assert isinstance(folded, FoldedGraph)
    with pytest.raises(TypeError, match="not iterable"):
        list(folded)


class Own(nn.Module):
    """Residual units in a network that is not the library's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.unit = ResidualUnit(8, 8, 4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.unit(self.unit(self.stem(x)))  # one module, used twice
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def test_a_network_of_ones_own_folds_where_it_can():
    folded = check(Own(), 3)
    assert isinstance(folded.unit, FoldedResidualUnit)
    assert type(folded.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_stays_takes_the_dtype_too(dtype):
    module = trained(Own())
    folded, x = fold_for_inference(module, dtype), torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        found = folded(x.to(dtype))
        assert found.dtype == dtype
        assert_close(found.float(), module(x), rtol=0.1, atol=0.1)
    assert folded.norm.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_module_used_twice_folds_once():
    unit = ResidualUnit(6, 6, 4)
    folded = check(nn.ModuleDict({"a": nn.Sequential(unit, unit), "b": unit})["a"], 6)
    assert folded[0] is folded[1]
    holder = nn.Module()
    holder.first, holder.second = unit, nn.Sequential(unit)
    folded = fold_for_inference(holder)
    assert folded.first is folded.second[0]


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(nn.BatchNorm2d):
    def forward(self, x):
        return -super().forward(x)


class Louder(ResidualUnit):
    def forward(self, x):
        return 3 * super().forward(x)


def swap_conv(unit):
    unit.conv2.conv = Doubled(8, 8, 3, padding=1)


def swap_bn(unit):
    unit.conv2.bn = Negated(8)


def group_norm(unit):
    unit.conv3.bn = nn.GroupNorm(2, 8)


def hook_conv(unit):
    unit.conv2.conv.register_forward_hook(lambda module, args, out: out * 2)


def hook_bn(unit):
    unit.conv3.bn.register_forward_pre_hook(lambda module, args: args[0] + 1)


def hook_unit(unit):
    unit.register_forward_hook(lambda module, args, out: out - 1)


def own_forward(unit):
    unit.conv3.conv.forward = lambda x: torch.ones(2, 8, *x.shape[2:], dtype=x.dtype)


def reflect(unit):
    unit.conv2.conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")


def no_statistics(unit):
    unit.conv3.bn = nn.BatchNorm2d(8, track_running_stats=False)


AS_WRITTEN = [swap_conv, swap_bn, group_norm, hook_conv, hook_bn, hook_unit, own_forward, reflect,
              no_statistics]  # fmt: skip


@pytest.mark.parametrize("options", [{"dilation": 2, "padding": 2}, {"padding": 1, "groups": 2}])
def test_dilated_and_grouped_convolutions_of_a_unit_fold(options):
    unit = ResidualUnit(8, 8, 8)
    unit.conv2.conv = nn.Conv2d(8, 8, 3, **options)
    assert isinstance(check(nn.Sequential(unit), 8)[0], FoldedResidualUnit)


@pytest.mark.parametrize("change", AS_WRITTEN, ids=lambda change: change.__name__)
def test_what_is_not_the_librarys_own_stays_as_written(change):
    unit, other = ResidualUnit(8, 8, 8), ResidualUnit(8, 8, 8)
    change(unit)
    trained(module := nn.Sequential(unit, other))
    folded, x = fold_for_inference(module), torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        assert_close(folded(x), module(x), rtol=1e-4, atol=1e-4)
    assert [type(part) for part in folded] == [ResidualUnit, FoldedResidualUnit]


def test_a_subclass_with_a_forward_of_its_own_stays():
    module, x = trained(nn.Sequential(Louder(8, 8, 8), ResidualUnit(8, 8, 8))), torch.randn(2, 8, 6, 5)
    folded = fold_for_inference(module)
    with torch.no_grad():
        assert_close(folded(x), module(x), rtol=1e-4, atol=1e-4)
    assert type(folded[0]) is Louder


def test_a_synchronised_network_folds_whole():
    network = models.create_model("ran_compact", width=0.125)
    folded = check(nn.SyncBatchNorm.convert_sync_batchnorm(network), 3, [(20, 27)])
    assert count(folded, nn.SyncBatchNorm) == count(models.create_model("ran_compact", width=0.125), ResidualUnit) + 1


def prune_weight(conv):
    prune.l1_unstructured(conv, "weight", 0.5)


def prune_twice(conv):
    prune.random_unstructured(conv, "weight", 0.3)
    prune.l1_unstructured(conv, "weight", 0.3)


REPARAMETRISATIONS = {
    "prune": prune_weight,
    "prune twice": prune_twice,
    "weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "parametrised weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "parametrised spectral_norm": lambda conv: parametrizations.spectral_norm(conv),
    "parametrised orthogonal": lambda conv: parametrizations.orthogonal(conv),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REPARAMETRISATIONS)
def test_weights_worked_out_of_others_are_worked_out_once(name):
    module, x = nn.Sequential(ResidualUnit(8, 16, 8), ResidualUnit(16, 16, 8)), torch.randn(2, 8, 6, 5)
    for unit in module:
        REPARAMETRISATIONS[name](unit.conv2.conv)
    module(x)  # a training step leaves a weight that torch cannot copy
    trained(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))  # and an optimizer goes past the weight
    expected = [key for key, _ in module.named_parameters()]
    folded = fold_for_inference(module)
    with torch.no_grad():
        assert_close(folded(x), module(x), rtol=1e-3, atol=1e-3)
    assert count(folded, FoldedResidualUnit) == 2
    assert [key for key, _ in module.named_parameters()] == expected


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        BNReLU(4),
        BNReLUConv2d(4, 4, 1),
        AttentionGate(),
        nn.Sequential(BNReLUConv2d(4, 4, 1), nn.ReLU()),
        nn.Sequential(ResidualUnit(4, 4, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_nothing_to_fold_is_an_error(module):
    if isinstance(module[0] if isinstance(module, nn.Sequential) else module, ResidualUnit):
        module[0].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match=rf"nothing to fold in model, a {type(module).__name__}: it needs conv"):
        fold_for_inference(module)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        fold_for_inference("ran_compact")
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match="dtype must be a floating-point type"):
            fold_for_inference(ResidualUnit(4, 4, 4), dtype)


def test_a_training_model_is_left_in_training_and_its_fold_stays_in_evaluation():
    network, x = models.create_model("ran_compact", width=0.125), torch.randn(2, 3, 20, 20)
    trained(network).train()
    folded = fold_for_inference(network)
    assert all(part.training for part in network.modules())
    with torch.no_grad():
        expected = folded(x)
        assert_close(folded.train()(x), expected)
        assert_close(nn.Sequential(folded).train()(x), expected)
    assert not any(part.training for part in folded.modules())


def test_wrappers_are_taken_off():
    network, x = trained(models.create_model("ran_compact", width=0.125)), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        for wrapped in (nn.DataParallel(network), torch.compile(network, backend="eager")):
            folded = fold_for_inference(wrapped)
            assert isinstance(folded, FoldedNetwork)
            assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
        inside = nn.Sequential(torch.compile(network, backend="eager"))
        assert isinstance(fold_for_inference(inside)[0], FoldedNetwork)


def test_parts_of_a_network_that_were_exchanged():
    network, x = models.create_model("ran_compact", width=0.125), torch.randn(2, 3, 20, 20)
    network.fc = nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 7))
    network.bn1 = nn.GroupNorm(2, 8)
    network.conv1 = Doubled(3, 8, 5, padding=2)
    network.stage1[1].mask.conv1 = nn.Conv2d(16, 16, 3, padding=1)
    folded = fold_for_inference(trained(network))
    with torch.no_grad():
        assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
        assert fold_for_inference(network, torch.bfloat16)(x).dtype == torch.float32
    assert type(folded.stages[0][1].mask.conv2) is nn.Conv2d
    assert isinstance(folded.stages[1][1].mask.conv2, nn.Identity)


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_modules_of_odd_sizes(depth):
    folded = check(AttentionModule(8, depth, skip=True), 8, [(3, 3), (5, 8), (13, 9)])
    assert count(folded, FoldedResidualUnit) == count(AttentionModule(8, depth, skip=True), ResidualUnit)


@pytest.mark.parametrize("shape", [(2, 4, 20, 20), (3, 20, 20), (2, 3, 5, 20)])
def test_a_folded_network_refuses_what_the_network_refuses(shape):
    network = models.create_model("ran_compact", width=0.125)
    for refusing in (network, fold_for_inference(network)):
        with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\) with H and W at least 6, got \["):
            refusing(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_folded_network_keeps_its_dtype(dtype):
    folded, x = fold_for_inference(models.ran_compact(width=0.125)), torch.randn(1, 3, 8, 8)
    expected = folded(x)
    for change in (lambda: folded.to("cpu", dtype), lambda: folded.to(dtype)):
        with pytest.raises(TypeError, match=re.escape(f"fold_for_inference(model, dtype={dtype})")):
            change()
    assert torch.equal(folded.float()(x), expected)
    assert_close(folded.to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_folded_convolution_is_as_plain_pytorch_for_odd_arguments(layout):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    folded = FoldedConv2d(conv, conv.weight.double(), conv.bias.double(), False, torch.float32).requires_grad_(False)
    x = torch.randn(2, 8, 9, 8).to(memory_format=layout)
    for one in (x[..., ::2], x[:, :, 1:, ::3], x[::2], x[:1, :, :1, :1].expand(3, 8, 6, 5), x[0]):
        assert_close(folded(one), conv(one))
    for residual in (torch.randn(2, 8, 1, 1), torch.randn(8, 1, 8), torch.randn(2, 8, 9, 8)):
        assert_close(folded(x, residual), conv(x) + residual)
    for wrong in (x[:, :4], x[:, :, :, 0, None, None], x.double()):
        with pytest.raises(RuntimeError) as expected:
            conv(wrong)
        with pytest.raises(RuntimeError, match=re.escape(expected.value.args[0][:30])):
            folded(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("conv", "relu", "adds"),
    [
        (nn.Conv2d(16, 24, 3, padding=1), True, True),
        (nn.Conv2d(16, 24, 3, padding=1), False, False),
        (nn.Conv2d(16, 24, 1), True, True),
        (nn.Conv2d(16, 24, 5, 2, 2), True, False),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), True, True),
        (nn.Conv2d(16, 24, 3, padding=2, dilation=2), False, True),
    ],
)
def test_sixteen_bits_never_take_a_library_that_is_slow_for_them(dtype, conv, relu, adds, monkeypatch):
    """They are multiplied in float32 where the processor has no instruction for them, and as accurate as PyTorch's."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    folded = _folded_conv.folded(conv, None, relu, dtype).requires_grad_(False)
    out = F.conv2d(x, folded.weight, folded.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    residual = torch.randn_like(out) if adds else None

    def plain(of):
        made = F.conv2d(
            *(t.to(of) for t in (x, folded.weight, folded.bias)), conv.stride, conv.padding, conv.dilation, conv.groups
        )
        made = made if residual is None else made + residual.to(of)
        return F.relu(made) if relu else made

    eager, exact = plain(dtype), plain(torch.float64)
    in_hardware = dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if torch.backends.mkldnn.is_available() and not in_hardware:
        monkeypatch.setattr(_folded_conv.F, "conv2d", None)
    found = folded(x, residual)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()
