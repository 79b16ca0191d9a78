"""Batch normalisation + ReLU against plain PyTorch; what it shares with the convolution is tested there too."""

import copy

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, MEANS, assert_accurate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ran_ext import ops, set_backend
from ran_ext.nn import BNReLU

pytestmark = pytest.mark.usefixtures("native")


def check(shape, dtype, layout, training, affine=True, offset=1.0, times=2.0) -> None:
    c = shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(shape, dtype=torch.float64) * 2 + offset).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
    dout, stats = torch.randn(shape).to(dtype), (torch.randn(c), torch.rand(c) + 0.5)

    def run(fn, x: Tensor, wide: torch.dtype) -> list[Tensor]:
        inputs = [
            t if t is None else t.detach().to(d).requires_grad_()
            for t, d in ((x, x.dtype), (weight, wide), (bias, wide))
        ]
        running = [s.clone().to(wide) for s in stats]
        out = fn(*inputs, *running, training=training, momentum=0.3)
        out.backward(dout.to(x.dtype))
        return [out.detach(), *(t.grad for t in inputs if t is not None), *running]

    exact = run(ops.bn_relu_ref, x.double(), torch.float64)
    eager, ours = run(ops.bn_relu_ref, x, wide), run(ops.bn_relu, x, wide)
    names = ["out", "dx", *(["dweight", "dbias"] if affine else []), "running_mean", "running_var"]
    for name, a, b, e in zip(names, ours, eager, exact, strict=True):
        assert_accurate(name, a, b, e, times, mean=offset / 2)
    assert ours[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 1, 3, 5), (3, 5, 7, 9), (1, 130, 9, 7), (70, 33, 2, 2)])
def test_values_gradients_and_statistics(shape, training, dtype, layout):
    check(shape, dtype, LAYOUTS[layout], training)


@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_large_mean_does_not_cancel(layout):
    for offset in (1e2, 1e4):
        check((4, 8, 16, 16), torch.float32, layout, True, offset=offset)


def test_without_affine_parameters():
    check((4, 6, 5, 5), torch.float32, torch.channels_last, True, affine=False)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
    training=st.booleans(),
    mean=st.sampled_from(MEANS),
)
def test_any_shape(shape, dtype, layout, training, mean):
    assume(shape[0] * shape[2] * shape[3] >= 16)  # of very few values the exact gradient cancels to nothing
    check(shape, dtype, layout, training, offset=2 * mean, times=4)


def test_sliced_input_and_gradient():
    base = torch.randn(4, 12, 9, 10)
    for x in (base[:, 2:7], base[..., ::2], base.permute(0, 3, 1, 2), base[:, :, 1:4, 2:9]):
        a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
        ours, theirs = (
            f(t, None, None, None, None, training=True) for f, t in ((ops.bn_relu, a), (ops.bn_relu_ref, b))
        )
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn(ours.shape[::-1]).permute(3, 2, 1, 0)
        ours.backward(weight)
        theirs.backward(weight)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def modules(**options) -> tuple[nn.BatchNorm2d, BNReLU]:
    plain = nn.BatchNorm2d(6, **options)
    fused = BNReLU(6, **options)
    fused.bn.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2}]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_module_behaves_as_batch_norm(options, backend):
    plain, fused = modules(**options)
    with set_backend(backend):
        for training in (True, True, True, False):
            x = torch.randn(3, 6, 5, 4)
            plain.train(training), fused.train(training)
            torch.testing.assert_close(fused(x), torch.relu(plain(x)))
            for name, value in plain.state_dict().items():
                torch.testing.assert_close(fused.bn.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_checkpointing_counts_a_batch_once(use_reentrant, backend):
    _, fused = modules()
    twin = copy.deepcopy(fused)
    x = torch.randn(4, 6, 5, 5)
    with set_backend(backend):
        checkpoint(fused, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
        twin(x).sum().backward()
    assert fused.bn.num_batches_tracked == 1
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=name)
    torch.testing.assert_close(fused.bn.weight.grad, twin.bn.weight.grad)


def test_nan_reaches_output_and_gradient():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    poisoned = x.detach().clone()
    poisoned[0, 1, 0, 0] = float("nan")
    poisoned.requires_grad_()
    out = ops.bn_relu(poisoned, None, None, None, None, training=True)
    ref = ops.bn_relu_ref(poisoned, None, None, None, None, training=True)
    assert torch.equal(out.isnan(), ref.isnan())
    out.sum().backward()
    assert poisoned.grad[:, 1].isnan().all()
    assert not poisoned.grad[:, 0].isnan().any()


def test_empty_batch():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        out = ops.bn_relu(x, None, None, torch.zeros(3), torch.ones(3))
        out.sum().backward()
        assert out.shape == x.grad.shape == shape


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors(backend):
    x = torch.zeros(2, 3, 4, 4)
    ones = torch.ones(3)
    cases = [
        (lambda: ops.bn_relu(x[0], None, None, None, None), ValueError, r"x must be \(N, C, H, W\), got \[3, 4, 4\]"),
        (lambda: ops.bn_relu(x.int(), None, None, None, None), TypeError, "floating point, got torch.int32"),
        (lambda: ops.bn_relu(x, torch.ones(4), None, None, None), ValueError, r"weight must be \[3\].*got \[4\]"),
        (lambda: ops.bn_relu(x, None, None, ones, None), ValueError, "both or neither"),
        (
            lambda: ops.bn_relu(x, None, None, ones, ones, training=True, momentum=None),
            ValueError,
            "num_batches_tracked",
        ),
        (
            lambda: ops.bn_relu(x, None, None, ones, ones, training=True, num_batches_tracked=torch.tensor(0.0)),
            ValueError,
            r"num_batches_tracked must be one int64 on x's device cpu, got torch.float32 \[\] on cpu",
        ),
        (lambda: ops.bn_relu(x[:1, :, :1, :1], None, None, None, None, training=True), ValueError, "more than 1 value"),
        (lambda: ops.bn_relu(x, ones.to("meta"), None, None, None), ValueError, "weight must be on x's device"),
    ]
    with set_backend(backend):
        for call, kind, text in cases:
            with pytest.raises(kind, match=f"bn_relu: .*{text}"):
                call()
