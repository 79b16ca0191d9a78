"""The modules: what they hold, and batch normalisation synchronised over processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accuracy import LAYOUTS, assert_accurate
from torch import Tensor, nn

from ran_ext import set_backend
from ran_ext.nn import AttentionGate, AttentionModule, BNReLU, BNReLUConv2d, ResidualUnit, SoftMaskBranch
from ran_ext.ops import chained_bn_relu_conv2d


def test_state_dict_keys_are_plain_pytorchs():
    plain = nn.ModuleDict({"bn": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 6, 3)})
    assert list(BNReLUConv2d(4, 6, 3).state_dict()) == list(plain.state_dict())
    assert list(BNReLU(4).state_dict()) == list(nn.ModuleDict({"bn": nn.BatchNorm2d(4)}).state_dict())


def test_residual_unit_is_the_preactivation_bottleneck():
    unit, x = ResidualUnit(8, 12, 4, stride=2).eval(), torch.randn(2, 8, 7, 7)
    h = x
    for block in (unit.conv1, unit.conv2, unit.conv3):
        h = block.conv(torch.relu(block.bn(h)))
    torch.testing.assert_close(unit(x), h + unit.shortcut(x))
    assert ResidualUnit(8, 8, 4).shortcut is None


def train_once(unit: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
    """Output, gradients and buffers of one forward and backward pass."""
    unit, x = copy.deepcopy(unit), x.detach().clone().requires_grad_()
    with set_backend(backend):
        out = unit(x)
    out.float().square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in unit.parameters()), *unit.buffers()]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels", [(64, 64, 32, 1), (32, 64, 32, 2), (12, 20, 9, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_residual_unit_chains_the_statistics(dtype, layout, channels, momentum):
    """conv2's batch normalisation takes what conv1 gave it: the same values, gradients and running statistics."""
    rows = []
    for _ in range(8 if dtype == torch.bfloat16 else 1):
        unit = ResidualUnit(*channels, bias=False)  # before a batch normalisation a bias's gradient is rounding alone
        for module in unit.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        x = (torch.randn(3, channels[0], 9, 7).to(dtype) + 1).to(memory_format=LAYOUTS[layout])
        for module in unit.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype, memory_format=LAYOUTS[layout])
        exact = train_once(copy.deepcopy(unit).double(), x.double(), "reference")
        if dtype == torch.float64:
            unit = unit.double()
        results = (train_once(unit, x, backend) for backend in ("native", "reference"))
        rows.append(list(zip(*results, exact, strict=True)))
    # A rounding that changes the sign of one value before a ReLU changes a gradient by more than all others do: of 16
    # bits several units are taken together.
    for i, each in enumerate(zip(*rows, strict=True)):
        ours, eager, wanted = (torch.stack(of) for of in zip(*each, strict=True))
        if ours.is_floating_point():
            assert_accurate(f"tensor {i}", ours, eager, wanted, times=4 if len(rows) == 1 else 2)
        else:
            assert torch.equal(ours, wanted)


@pytest.mark.usefixtures("native")
def test_chained_statistics_are_those_of_the_stored_result():
    first, second = BNReLUConv2d(64, 32, 1), BNReLUConv2d(32, 32, 3, padding=1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 64, 6, 7).to(dtype, memory_format=torch.channels_last)
        unit = copy.deepcopy(first)
        unit.conv.to(dtype)
        out, statistics, _ = chained_bn_relu_conv2d(x, unit.bn, unit.conv, next_bn=second.bn)
        var, mean = torch.var_mean(out.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(statistics.var.double(), var, rtol=1e-5, atol=1e-6)
    assert second.bn.num_batches_tracked == 2
    assert first.bn.num_batches_tracked == 0


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", [(32, 32, 1, 0), (32, 32, 3, 1), (5, 7, 3, 1)])
def test_identity_adds_its_gradient_in_the_convolutions_backward(case):
    """``x`` used elsewhere too, through ``identity``: gradients as autograd would add them; the two alone and twice."""
    c_in, c_out, kernel, padding = case
    unit = BNReLUConv2d(c_in, c_out, kernel, padding=padding).double()
    following = nn.BatchNorm2d(c_out).double()
    x = torch.randn(3, c_in, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, c_in, 5, 4, dtype=torch.float64)

    def loss(use_out: bool, use_identity: bool) -> Tensor:
        out, _, identity = chained_bn_relu_conv2d(x, unit.bn, unit.conv, next_bn=following)
        assert torch.equal(identity, x)
        return (out.square().sum() if use_out else 0) + ((weights * identity.square()).sum() if use_identity else 0)

    out_alone, identity_alone, both = (
        torch.autograd.grad(loss(*used), x)[0] for used in ((True, False), (False, True), (True, True))
    )
    torch.testing.assert_close(identity_alone, 2 * weights * x)
    torch.testing.assert_close(both, out_alone + identity_alone, rtol=1e-12, atol=1e-12)
    torch.autograd.gradgradcheck(
        lambda x: chained_bn_relu_conv2d(x, unit.bn, unit.conv, next_bn=following)[::2], (x,), fast_mode=True
    )


@pytest.mark.usefixtures("native")
def test_chain_is_broken_where_it_would_not_hold():
    unit, x = ResidualUnit(32, 32, 32), torch.randn(2, 32, 5, 5)
    with pytest.warns(DeprecationWarning, match="use ran_ext.ops.chained_bn_relu_conv2d"):
        out, statistics, identity = unit.conv1(x, following=unit.conv2)
    assert identity.data_ptr() == x.data_ptr()
    assert unit.conv2.bn.num_batches_tracked == 1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        torch.testing.assert_close(unit.conv2(out, statistics=statistics), unit.conv2(out))
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert unit.eval().conv1(x, following=unit.conv2).statistics is None
    unit.train().conv2.conv = nn.Conv2d(32, 32, 3, padding=1, groups=2)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert unit.conv1(x, following=unit.conv2).statistics is None
    unit(x)
    assert unit.conv2.bn.num_batches_tracked == 3
    unit = ResidualUnit(32, 32, 32)
    with set_backend("reference"), pytest.warns(DeprecationWarning, match="deprecated"):
        assert unit.conv1(x, following=unit.conv2).statistics is None


def test_attention_module_equals_masks_at_full_resolution():
    module, x = AttentionModule(8, 2, skip=True).eval(), torch.randn(2, 8, 12, 8)
    y = module.pre(x)
    mask = module.mask
    captured = []
    hook = mask.conv1.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    out = module(x)
    hook.remove()
    wide = nn.functional.interpolate(captured[0], scale_factor=2, mode="nearest")
    expected = module.post((1 + torch.sigmoid(mask.conv2(mask.conv1(wide)))) * module.trunk(y))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_hook_between_mask_and_gate_is_called_and_changes_no_bit(training):
    """Hooks part the gate from the mask's last convolution; without them they are one op."""
    module, x = AttentionModule(8, 2).train(training), torch.randn(2, 8, 9, 7)
    alone, seen = copy.deepcopy(module), []
    assert module.gate_conv is module.mask.conv2
    for part in (module.gate, module.mask, module.mask.conv2):
        handle = part.register_forward_hook(lambda part, inputs, out: seen.append(part))
        assert module.gate_conv is None
        assert torch.equal(copy.deepcopy(module)(x), copy.deepcopy(alone)(x))
        handle.remove()
    assert len(seen) == 3
    with torch.nn.modules.module.register_module_forward_hook(lambda part, *args: seen.append(part)):
        assert torch.equal(copy.deepcopy(module)(x), copy.deepcopy(alone)(x))
    assert {AttentionGate, SoftMaskBranch} < {type(part) for part in seen[3:]}
    module.gate.forward = lambda trunk, mask: trunk  # as libraries that wrap modules do
    assert module.gate_conv is None


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module.mask, "conv2", nn.Identity()),
        lambda module: setattr(module.mask, "conv2", nn.Conv2d(8, 8, 3, padding=1)),
        lambda module: setattr(module.mask, "conv2", nn.Conv2d(8, 8, 1, groups=2)),
        lambda module: setattr(module.mask, "conv2", nn.Conv2d(8, 8, 3, 1, "same")),
        lambda module: setattr(module, "mask", nn.AvgPool2d(2, ceil_mode=True)),
        lambda module: nn.utils.weight_norm(module.mask.conv2),
    ],
)
def test_other_kinds_of_mask_run_as_written(change):
    module, x = AttentionModule(8, 1).eval(), torch.randn(2, 8, 9, 7)
    change(module)
    assert module.gate_conv is None
    y = module.pre(x)
    torch.testing.assert_close(module(x), module.post(module.gate(module.trunk(y), module.mask(y))))


def test_gate_module_says_its_scale():
    assert repr(AttentionGate(2)) == "AttentionGate(scale_factor=2)"


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(BNReLUConv2d(3, 32, 3, padding=1), BNReLUConv2d(32, 32, 1), BNReLU(32)).double()


def inputs(sizes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(n, 3, 5, 5, dtype=torch.float64) * 2 + i for i, n in enumerate(sizes)]


def sync_worker(rank: int, port: int, sizes: tuple[int, ...], backend: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(sizes))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    x = inputs(sizes)[rank].requires_grad_()
    with set_backend(backend):
        out = model(x)
        out.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for g in grads:
        dist.all_reduce(g)
    results[rank] = [t.detach().clone().numpy() for t in (out, x.grad, *grads, *model.buffers())]
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(3, 2), (4, 0)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_processes_together_equal_one(sizes, backend):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        port = 29500 + torch.randint(2000, ()).item() + (7 if backend == "auto" else 0) + sizes[1]
        mp.spawn(sync_worker, (port, sizes, backend, results), nprocs=len(sizes))
        found = [[torch.from_numpy(a) for a in results[rank]] for rank in range(len(sizes))]
    model, x = network(), torch.cat(inputs(sizes)).requires_grad_()
    out = model(x)
    out.square().sum().backward()
    torch.testing.assert_close(torch.cat([f[0] for f in found]), out)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), x.grad)
    for rank in range(len(sizes)):
        for got, expected in zip(
            found[rank][2:], [*(p.grad for p in model.parameters()), *model.buffers()], strict=True
        ):
            torch.testing.assert_close(got, expected)


def test_without_processes_a_synchronised_module_is_an_ordinary_one():
    plain, synchronised = network(), nn.SyncBatchNorm.convert_sync_batchnorm(network())
    x = inputs((4,))[0]
    torch.testing.assert_close(synchronised(x), plain(x))
    assert list(synchronised.state_dict()) == list(plain.state_dict())
