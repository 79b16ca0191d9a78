"""The modules: what they hold, and batch normalisation synchronised over processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ran_ext import set_backend
from ran_ext.nn import AttentionGate, AttentionModule, BNReLU, BNReLUConv2d, ResidualUnit, convert_sync_batchnorm


def test_state_dict_keys_are_plain_pytorchs():
    plain = nn.ModuleDict({"bn": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 6, 3)})
    assert list(BNReLUConv2d(4, 6, 3).state_dict()) == list(plain.state_dict())
    assert list(BNReLU(4).state_dict()) == list(nn.BatchNorm2d(4).state_dict())


def test_residual_unit_is_the_preactivation_bottleneck():
    unit, x = ResidualUnit(8, 12, 4, stride=2).eval(), torch.randn(2, 8, 7, 7)
    h = x
    for block in (unit.conv1, unit.conv2, unit.conv3):
        h = block.conv(torch.relu(block.bn(h)))
    torch.testing.assert_close(unit(x), h + unit.shortcut(x))
    assert ResidualUnit(8, 8, 4).shortcut is None


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
    model = convert_sync_batchnorm(network())
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
    plain, synchronised = network(), convert_sync_batchnorm(network())
    x = inputs((4,))[0]
    torch.testing.assert_close(synchronised(x), plain(x))
    assert list(synchronised.state_dict()) == list(plain.state_dict())
