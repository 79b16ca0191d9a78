"""2x2 max-pooling against plain PyTorch: values, gradients, layouts, NaN and ties, derivatives, compile, errors."""

import large
import pytest
import torch
from accuracy import DTYPES, LAYOUTS, strided_views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ran_ext import ops, set_backend

pytestmark = pytest.mark.usefixtures("native")


def run(fn, x: Tensor, dout: Tensor, ceil_mode: bool) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = fn(x, ceil_mode)
    out.backward(dout)
    return [out.detach(), x.grad]


def check(
    shape: tuple[int, ...], ceil_mode: bool, dtype: torch.dtype, layout: torch.memory_format, nan: bool = False
) -> None:
    """Bit for bit PyTorch's: nothing is rounded. Whole numbers from -2 to 2, so that many windows hold equal maxima."""
    x = torch.randint(-2, 3, shape).to(dtype)
    if nan:
        x[torch.rand(shape) < 0.3] = float("nan")
        x[torch.rand(shape) < 0.3] = -float("inf")
    x = x.contiguous(memory_format=layout)
    dout = torch.randn_like(ops.max_pool2d_ref(x, ceil_mode))
    ours = run(ops.max_pool2d, x, dout, ceil_mode)
    if nan and x.is_cuda:  # PyTorch in channels_last loses the gradient of windows of -inf: docs/upstream.md
        x, dout = x.contiguous(), dout.contiguous()
    eager = run(ops.max_pool2d_ref, x, dout, ceil_mode)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert a.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 2, 2), (3, 5, 7, 9), (2, 37, 6, 5), (1, 64, 33, 31)])
def test_values_and_gradients(shape, ceil_mode, dtype, layout):
    check(shape, ceil_mode, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_as_in_pytorch(dtype, layout):
    check((2, 21, 9, 8), True, dtype, LAYOUTS[layout], nan=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 12), st.integers(2, 40)),
    ceil_mode=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
)
def test_any_shape(shape, ceil_mode, dtype, layout):
    check(shape, ceil_mode, dtype, layout)


def test_one_row_one_column_one_pixel():
    for size in ((1, 9), (9, 1), (1, 1)):
        check((2, 3, *size), True, torch.float32, torch.channels_last)


def test_empty_batch():
    x = torch.zeros(0, 3, 5, 4, requires_grad=True)
    out = ops.max_pool2d(x)
    out.sum().backward()
    assert (out.shape, x.grad.shape) == ((0, 3, 3, 2), x.shape)


def test_sliced_expanded_and_transposed_inputs():
    for x in strided_views():
        dout = torch.randn(*x.shape[:2], -(-x.shape[3] // 2), -(-x.shape[2] // 2)).transpose(2, 3)
        ours, eager = (run(fn, x, dout, True) for fn in (ops.max_pool2d, ops.max_pool2d_ref))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_gradcheck_and_second_derivatives():
    for size in ((4, 6), (3, 5)):
        x = torch.randperm(6 * size[0] * size[1]).double().view(2, 3, *size).requires_grad_()  # no two are close
        for ceil_mode in (True, False):
            assert torch.autograd.gradcheck(lambda t, c=ceil_mode: ops.max_pool2d(t, c), x)
            assert torch.autograd.gradgradcheck(lambda t, c=ceil_mode: ops.max_pool2d(t, c), x)


def test_function_transforms_and_forward_mode():
    x = torch.randn(2, 3, 4, 5)
    leaf = x.clone().requires_grad_()
    ops.max_pool2d(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda t: ops.max_pool2d(t).sum())(x), leaf.grad)
    _, tangent = torch.func.jvp(ops.max_pool2d, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones(2, 3, 2, 3))


def test_opcheck():
    for shape in ((2, 8, 5, 6), (2, 1, 4, 4), (2, 8, 2, 2)):
        for layout in LAYOUTS.values():
            x = torch.randn(shape).contiguous(memory_format=layout)
            out, index = torch.ops.ran_ext.max_pool2d(x)
            torch.library.opcheck(torch.ops.ran_ext.max_pool2d, (x.requires_grad_(),))
            torch.library.opcheck(torch.ops.ran_ext.max_pool2d_backward, (out, index, *shape[2:]))


def test_compiles_to_one_graph():
    x = torch.randn(2, 8, 7, 6)
    compiled = torch.compile(lambda t: ops.max_pool2d(t) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.max_pool2d_ref(x) * 2)


def test_keeps_one_byte_a_pixel():
    kept: list[Tensor] = []
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.max_pool2d(x)
    assert [t.nbytes for t in kept] == [out.numel()]


def test_follows_the_input_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in DTYPES:
            assert ops.max_pool2d(torch.randn(1, 2, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("x", "ceil_mode", "kind", "text"),
    [
        (torch.zeros(1, 2, 4, 4).int(), True, TypeError, "x must be floating point, got torch.int32"),
        (torch.zeros(2, 4, 4), True, ValueError, r"x must be \(N, C, H, W\) .* got \[2, 4, 4\]"),
        (torch.zeros(2, 0, 4, 4), True, ValueError, "at least one channel"),
        (torch.zeros(2, 3, 0, 4), True, ValueError, "1x1 pixels for ceil_mode=True"),
        (torch.zeros(2, 3, 1, 4), False, ValueError, r"2x2 pixels for ceil_mode=False, got \[2, 3, 1, 4\]"),
    ],
)
def test_errors_name_the_argument_and_the_rule(x, ceil_mode, kind, text, backend):
    with set_backend(backend), pytest.raises(kind, match=f"max_pool2d: .*{text}"):
        ops.max_pool2d(x, ceil_mode)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).byte(), 4, 4), ValueError, r"dout must be \(N, C, H, W\)"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 3).byte(), 4, 4), ValueError, r"index must be \[1, 2, 2, 2\]"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), 4, 4), TypeError, "index must be uint8, got Float"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2).byte(), 5, 4), ValueError, "dout must be 3x2 for a size of"),
    ],
)
def test_compiled_op_checks_for_itself(args, kind, text):
    with pytest.raises(kind, match=text):
        torch.ops.ran_ext.max_pool2d_backward(*args)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    x = large.zeros(*large.MORE_THAN_INT32)
    x[0, 0, -1, -1] = 3
    out = ops.max_pool2d(x)
    assert out[0, 0, -1, -1] == 3
    assert out.count_nonzero() == 1
