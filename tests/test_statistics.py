"""What batch normalisation takes of a batch and keeps of it: accuracy, NaN and infinities, empty batches, dtypes.

Every way that statistics are taken: by themselves in both memory formats, in a convolution's epilogue, over processes.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ran_ext import ops, set_backend
from ran_ext.ops import sync

pytestmark = pytest.mark.usefixtures("native")

WAYS = ("nchw", "channels_last", "epilogue", "processes")
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def one_process(tmp_path):
    """A group of one, for the statistics over processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def kept(way: str, x: Tensor, mean: Tensor, var: Tensor, momentum: float | None = 0.1) -> tuple[Tensor, Tensor, int]:
    """The running statistics and the count after a batch ``x``, which is normalised on the way of this name."""
    mean, var, batches = mean.clone(), var.clone(), torch.tensor(0)
    c = x.shape[1]
    if way == "epilogue":  # a convolution by the identity; its input is normalised with mean 0 and variance 1
        assert (x >= 0).logical_or(x.isnan()).all()
        first, conv = nn.BatchNorm2d(c, eps=0.0, affine=False).eval(), nn.Conv2d(c, c, 1, bias=False)
        nn.init.dirac_(conv.to(x.dtype).weight)
        following = nn.BatchNorm2d(c, momentum=momentum)
        following.running_mean, following.running_var, following.num_batches_tracked = mean, var, batches
        known = (first.running_mean, first.running_var)
        args = (None, None, *known, False, [], None, 0.0, conv.weight, None, None, [1, 1], [0, 0])
        x = x.contiguous(memory_format=torch.channels_last)
        torch.ops.ran_ext._chained_bn_relu_conv2d(x, *args, True, [mean, var, batches], momentum, False)
    elif way == "processes":
        bn = nn.SyncBatchNorm(c, momentum=momentum)
        bn.running_mean, bn.running_var, bn.num_batches_tracked = mean, var, batches
        sync.sync_bn_relu(x, bn)
    else:
        layout = torch.channels_last if way == "channels_last" else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        ops.bn_relu(x, None, None, mean, var, training=True, momentum=momentum, num_batches_tracked=batches)
    return mean, var, int(batches)


def eager(x: Tensor, mean: Tensor, var: Tensor, momentum: float = 0.1) -> tuple[Tensor, Tensor]:
    mean, var = mean.clone(), var.clone()
    F.batch_norm(x, mean, var, None, None, True, momentum)
    return mean, var


def relative(a: Tensor, exact: Tensor) -> float:
    return ((a.double() - exact) / exact).abs().max().item()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(29, 7), (1, 3), (67, 67), (8, 8)])
@pytest.mark.parametrize("mean", [30.0, 300.0, 3000.0, 10000.0])
def test_a_mean_of_many_deviations_costs_no_digit(mean, size, way):
    x = torch.randn(3, 64, *size) + mean
    _, exact = eager(x.double(), torch.zeros(64).double(), torch.zeros(64).double(), 1.0)
    _, plain = eager(x, torch.zeros(64), torch.zeros(64), 1.0)
    _, var, _ = kept(way, x, torch.zeros(64), torch.zeros(64), 1.0)
    assert relative(var, exact) <= max(2 * relative(plain, exact), 5e-7)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinities_reach_what_is_kept(way, dtype):
    x = torch.rand(2, 64, 5, 7).to(dtype)
    x[1, 3, 2, 2], x[0, 4, 4, 6], x[0, 5, 0, 0], x[1, 5, 4, 6] = NAN, INF, INF, NAN
    if way != "epilogue":  # whose ReLU would stop it; and 0 * infinity is NaN in its sums
        x[0, 6, 1, 1], x[1, 7, 0, 0], x[1, 7, 0, 1] = -INF, -INF, INF
    else:
        x[:, 4] = 1.0
    fresh = torch.zeros(64), torch.ones(64)
    mean, var, _ = kept(way, x, *fresh)
    if way == "epilogue":  # NaN of one channel reaches every output channel
        assert mean.isnan().all()
        assert var.isnan().all()
        return
    wanted = eager(x.float(), *fresh)
    torch.testing.assert_close(mean, wanted[0], equal_nan=True)
    torch.testing.assert_close(var, wanted[1], equal_nan=True)
    assert mean[4] == INF
    assert mean[6] == -INF
    assert var[3:8].isnan().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_is_counted_and_changes_nothing_else(shape, momentum, backend):
    module = nn.BatchNorm2d(3, momentum=momentum)
    module.running_mean.fill_(5)
    module.running_var.fill_(7)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    batches = torch.tensor(0)
    x = torch.zeros(shape, requires_grad=True)
    options = {"training": True, "momentum": momentum, "num_batches_tracked": batches}
    with set_backend(backend):
        out = ops.bn_relu(x, None, None, mean, var, **options)
        out.sum().backward()
        if shape[0] == 0:
            ops.bn_relu_conv2d(x, None, None, mean, var, torch.ones(2, 3, 1, 1), **options)
            module(x)
    module(x)
    assert torch.equal(mean, module.running_mean)
    assert torch.equal(var, module.running_var)
    assert batches == module.num_batches_tracked
    assert x.grad.shape == shape


@pytest.mark.parametrize("way", ["nchw", "channels_last", "epilogue"])
def test_what_cancels_against_the_batch_keeps_its_digits(way):
    """The running mean ends near 0: it takes the batch's as it was before it was rounded to float32."""
    x = torch.rand(4, 64, 9, 9) + 5
    exact = x.double().mean((0, 2, 3))
    old = -(exact / 9).float()
    mean, _, _ = kept(way, x, old, torch.ones(64))
    wanted, _ = eager(x.double(), old.double(), torch.ones(64).double())
    assert (mean.double() - wanted).abs().max() < 1e-9  # rounding the batch's mean first costs 2e-8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_numbers_whose_mean_is_zero_have_a_mean_of_zero(layout):
    x = torch.randint(-9, 9, (3, 5, 7, 11)).float()
    x = torch.cat([x, torch.roll(-x, 1, 0)]).contiguous(memory_format=layout)
    mean, _ = torch.ops.ran_ext.batch_norm_stats(x, [], None)
    assert (mean == 0).all()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, op in zip(leaves, (ops.bn_relu, ops.bn_relu_ref), strict=True):
        op(leaf, None, None, None, None, training=True).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [-0.5, 0.0, 1.5, NAN])
def test_any_momentum_as_in_pytorch(momentum):
    x, fresh = torch.randn(4, 5, 6, 6), (torch.randn(5), torch.rand(5))
    for found, wanted in zip(kept("nchw", x, *fresh, momentum), eager(x, *fresh, momentum), strict=False):
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_kept_may_have_any_one_dtype(dtype):
    x, mean, var = torch.randn(4, 5, 6, 6), torch.randn(5).to(dtype), torch.rand(5).to(dtype)
    found = kept("nchw", x, mean, var)
    wanted = eager(x.double(), mean.double(), var.double())
    for a, b in zip(found, wanted, strict=False):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))
