"""Converted networks under what else acts on networks: compilers, transforms, copies, processes, optimizers."""

import copy
import io
import pickle

import pytest
import torch
from small_networks import assert_same, build, images, pair, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from ran_ext import convert
from ran_ext._compare import bytes_kept
from ran_ext._converted import Converted, Deferring


def test_hooks_on_a_normalisation_see_its_value():
    plain, ours = pair("preact")
    seen = []
    for network in (plain, ours):
        network[1].bn1.register_forward_hook(lambda module, args, out: seen.append(out))
    x = images()
    assert_same(step(plain, x), step(ours, x))
    assert type(seen[1]) is torch.Tensor
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("name", ["preact", "postact", "dense"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_as_before(name, reentrant):
    plain, ours = pair(name)

    def through(network):
        return lambda x: checkpoint(network, x, use_reentrant=reentrant)

    for network in (plain, ours):
        network.zero_grad()
    grads = []
    for network in (plain, ours):
        x = images().requires_grad_()
        through(network)(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    assert_same(*grads)


def test_double_backward():
    plain, ours = pair("preact")
    found = []
    for network in (plain, ours):
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([x.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert_same(*found)


def test_function_transforms():
    plain, ours = pair("preact")
    for network in (plain, ours):
        network.eval()
    found = []
    for network in (plain, ours):
        parameters = dict(network.named_parameters())

        def loss(parameters, x, network=network):
            return torch.func.functional_call(network, parameters, (x,)).square().sum()

        grads = torch.func.grad(loss)(parameters, images())
        each = torch.func.vmap(lambda x, loss=loss, p=parameters: loss(p, x[None]))(images())
        found.append([*grads.values(), each])
    assert_same(*found)


class Lower(nn.Module):
    """A network under autocast."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x)


@pytest.mark.parametrize("name", ["preact", "postact", "dense", "mobile", "silu", "leaky", "hardswish in place"])
def test_autocast_is_as_accurate_and_keeps_less(name):
    plain, ours = pair(name, torch.float32)
    dout = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    found = []
    for network in (copy.deepcopy(plain).double(), Lower(plain), Lower(ours)):
        is_exact = not isinstance(network, Lower)
        x = images(torch.float64 if is_exact else torch.float32).requires_grad_()
        out = network(x)
        out.backward(dout.to(out.dtype))
        found.append(
            [
                out.detach(),
                x.grad,
                *(p.grad for p in network.parameters()),
                *map(torch.Tensor.double, network.buffers()),
            ]
        )
    for exact, theirs, mine in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        least = 1e-3 * (1 + exact.double().norm())
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm() + least
    assert bytes_kept(Lower(ours), [images(torch.float32)]) < bytes_kept(Lower(plain), [images(torch.float32)])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_autocast_leaves_float64_to_torch(name):
    _, ours = pair("dense", torch.float32)
    parameter = getattr(ours[1].convs[1], name)
    parameter.data = parameter.data.double()
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        Lower(ours)(images(torch.float32))


def test_copies_pickles_and_files():
    plain, ours = pair("preact")
    x = images()
    step(plain, x)
    expected = step(plain.eval(), x)
    step(ours, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert isinstance(twin[1].bn1, Deferring)
        assert twin[1].bn1 is not ours[1].bn1
        assert_same(step(twin.eval(), x), expected)


@pytest.mark.parametrize("name", ["preact", "dense", "silu"])
def test_compiled_it_is_one_graph_and_right(name):
    plain, ours = pair(name, torch.float32)
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(ours, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for seed in range(3):
        x = images(torch.float32, seed)
        for mine, theirs in zip(step(compiled, x), step(plain, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(list(ours.buffers()), list(plain.buffers()))
    assert len(graphs) == 1
    assert_close_after_eager(plain, ours)


def assert_close_after_eager(plain, ours):
    x = images(torch.float32, 9)
    for mine, theirs in zip(step(ours, x), step(plain, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_compiled_part_takes_a_deferred_tensor():
    torch.compiler.reset()
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3))).double()
    ours = convert(copy.deepcopy(plain))
    ours[1].compile(backend="eager")
    assert_same(step(plain, images()), step(ours, images()))


def test_a_compiled_block_inside_a_network_whose_joins_are_kept():
    torch.compiler.reset()
    plain, ours = pair("dense", torch.float32)
    ours[1].compile(backend="eager", fullgraph=True)
    assert_close_after_eager(plain, ours)


def test_inference_mode():
    plain, ours = pair("preact")
    x = images()
    for mode in (True, False):
        with torch.inference_mode():
            torch.testing.assert_close(ours.train(mode)(x), plain.train(mode)(x))
    assert_same(list(plain.buffers()), list(ours.buffers()))


class WritesMeanwhile(nn.Module):
    """Writes to a normalisation's input or parameter before its value is used."""

    def __init__(self, write):
        super().__init__()
        self.bn, self.conv, self.write = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), write

    def forward(self, x):
        y = torch.relu(self.bn(x))
        self.write(x, self.bn)
        return self.conv(y)


def test_writes_to_an_input_made_in_inference_mode():
    plain = WritesMeanwhile(lambda x, bn: x.add_(1)).eval()
    ours = convert(copy.deepcopy(plain))
    with torch.inference_mode():
        x = torch.randn(2, 8, 6, 6)
        torch.testing.assert_close(ours(x.clone()), plain(x.clone()))


def test_writes_to_parameters_made_in_inference_mode():
    x = torch.randn(2, 8, 6, 6)
    with torch.inference_mode():
        plain = WritesMeanwhile(lambda x, bn: bn.weight.mul_(2)).eval()
        ours = convert(copy.deepcopy(plain))
        torch.testing.assert_close(ours(x), plain(x))


def test_synchronised_normalisations_made_later():
    plain, ours = pair("preact")
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
    assert_same([plain.eval()(images())], [ours.eval()(images())])


def test_unused_parameters_stay():
    network = build("preact")
    network.unused, network[1].scale = nn.BatchNorm2d(5), nn.Parameter(torch.ones(3))
    names = [name for name, _ in network.named_parameters()]
    parameters = [id(p) for p in network.parameters()]
    convert(network)
    assert [name for name, _ in network.named_parameters()] == names
    assert [id(p) for p in network.parameters()] == parameters


def test_an_optimizer_made_before_goes_on():
    plain = build("preact")
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    twin = copy.deepcopy(plain)
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for seed in range(3):
        for network, one in ((plain, optimizer), (twin, other)):
            step(network, images(seed=seed))
            one.step()
        convert(twin)  # after the first step; twice does nothing
    assert_same(list(plain.state_dict().values()), list(twin.state_dict().values()))
    average = torch.optim.swa_utils.AveragedModel(twin)
    average.update_parameters(twin)
    assert_same(step(average, images()), [*step(twin, images())])


def test_symbolic_traces_and_jit_traces_are_plain():
    plain, ours = pair("preact")
    plain.eval(), ours.eval()
    x = images()
    for traced in (torch.fx.symbolic_trace(ours), torch.jit.trace(ours, x), torch.export.export(ours, (x,)).module()):
        torch.testing.assert_close(traced(x), plain(x), rtol=1e-8, atol=1e-10)


def test_forward_mode_differentiation():
    plain, ours = pair("silu")
    found = []
    for network in (plain.eval(), ours.eval()):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(images(), images(seed=4))
            found.append(torch.autograd.forward_ad.unpack_dual(network(dual)).tangent)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_scripted_parts_stay():
    plain, ours = (  # torch copies no gradients' places of scripted modules
        nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))).double()
        for _ in range(2)
    )
    convert(ours)
    assert isinstance(ours[0], Deferring)
    assert not any(isinstance(module, Converted) for module in ours[1].modules())
    assert_same(step(plain, images()), step(ours, images()))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    plain, ours = pair("preact")
    wrapped = nn.parallel.DistributedDataParallel(ours)
    for seed in range(2):
        assert_same(step(plain, images(seed=seed)), step(wrapped, images(seed=seed)))
    assert_same(list(plain.buffers()), list(ours.buffers()))


def test_fully_sharded(one_process):
    from torch.distributed.fsdp import fully_shard

    plain = build("preact")
    ours = convert(copy.deepcopy(plain), channels_last=False)  # torch shards contiguous parameters only
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(ours[1], mesh=mesh)
    fully_shard(ours, mesh=mesh)
    for seed in range(2):
        expected, found = step(plain, images(seed=seed)), step(ours, images(seed=seed))
        assert_same(expected, [t.full_tensor() if hasattr(t, "full_tensor") else t for t in found])
