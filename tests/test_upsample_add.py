"""Up-sampling with an addition against plain PyTorch: values, gradients, layouts, derivatives, compile, errors."""

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_accurate, strided_views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ran_ext import ops, set_backend

pytestmark = pytest.mark.usefixtures("native")


def make(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """lower, skip and dout for a result of ``shape``."""
    n, c, h, w = shape
    lower = torch.randn(n, c, -(-h // 2), -(-w // 2), dtype=torch.float64)
    return lower, torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def run(fn, lower: Tensor, skip: Tensor | None, dout: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (lower, skip) if t is not None]
    out = fn(*leaves, size=dout.shape[2:])
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(shape: tuple[int, ...], with_skip: bool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    cast = [t.to(dtype).contiguous(memory_format=layout) for t in make(shape)]
    if not with_skip:
        cast[1] = None
    exact_in = [t if t is None else t.double() for t in cast]
    ours, eager = run(ops.upsample_add, *cast), run(ops.upsample_add_ref, *cast)
    exact = run(ops.upsample_add_ref, *exact_in)
    for name, a, b, c in zip(("out", "dlower", "dskip"), ours, eager, exact, strict=False):
        assert_accurate(name, a, b, c)
        assert a.is_contiguous(memory_format=layout)
    assert torch.equal(ours[0], eager[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 37, 6, 5), (1, 64, 33, 31)])
def test_values_and_gradients(shape, with_skip, dtype, layout):
    check(shape, with_skip, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 2)])
def test_bilinear(size, with_skip, dtype, layout):
    lower, skip, dout = (t.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for t in make((2, 5, *size)))
    skip = skip if with_skip else None

    def plain(lower, skip=None, size=None):
        wide = F.interpolate(lower, size=size, mode="bilinear")
        return wide if skip is None else wide + skip

    ours = run(lambda *args, **named: ops.upsample_add(*args, interpolation="bilinear", **named), lower, skip, dout)
    torch.testing.assert_close(ours, run(plain, lower, skip, dout))
    twice = ops.upsample_add_ref(lower, interpolation="bilinear")
    torch.testing.assert_close(twice, F.interpolate(lower, scale_factor=2, mode="bilinear"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 40)),
    with_skip=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
)
def test_any_shape(shape, with_skip, dtype, layout):
    check(shape, with_skip, dtype, layout)


def test_empty_batch():
    lower = torch.zeros(0, 3, 3, 2, requires_grad=True)
    out = ops.upsample_add(lower, size=(5, 4))
    out.sum().backward()
    assert (out.shape, lower.grad.shape) == ((0, 3, 5, 4), lower.shape)


def test_size_defaults_to_the_skips_or_twice_the_lowers():
    lower, skip, _ = make((2, 3, 5, 6))
    assert ops.upsample_add(lower).shape == (2, 3, 6, 6)
    assert torch.equal(ops.upsample_add(lower, skip), ops.upsample_add_ref(lower, skip, (5, 6)))


def test_sliced_expanded_and_transposed_inputs():
    for skip in strided_views():
        low = torch.randn(-(-skip.shape[3] // 2), -(-skip.shape[2] // 2), *skip.shape[1::-1]).permute(3, 2, 1, 0)
        dout = torch.randn(skip.shape[::-1]).permute(3, 2, 1, 0)
        ours, eager = run(ops.upsample_add, low, skip, dout), run(ops.upsample_add_ref, low, skip, dout)
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)


def test_one_pixel_below_keeps_channels_last():
    lower = torch.randn(2, 1, 1, 8).permute(0, 3, 1, 2)  # strides are all that tells its format
    skip = torch.randn(2, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    for out in (ops.upsample_add(lower), ops.upsample_add(lower, skip)):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_nan_and_infinities_as_in_pytorch():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).view(1, 4, 1, 1)
    lower, skip = values.expand(-1, -1, 2, 4), values.view(1, 1, 1, 4).repeat(1, 4, 4, 2)
    ours, eager = (run(fn, lower, skip, skip) for fn in (ops.upsample_add, ops.upsample_add_ref))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_gradcheck_and_second_derivatives():
    lower, skip, _ = make((2, 3, 3, 4))
    lower.requires_grad_(), skip.requires_grad_()
    assert torch.autograd.gradcheck(ops.upsample_add, (lower, skip))
    assert torch.autograd.gradgradcheck(ops.upsample_add, (lower, skip))
    assert torch.autograd.gradgradcheck(lambda t: ops.upsample_add(t, size=(3, 4)), lower)


def test_only_what_is_asked_for_gets_a_gradient():
    lower, skip, dout = make((2, 3, 5, 4))
    ops.upsample_add(lower, skip.requires_grad_()).backward(dout)
    assert torch.equal(skip.grad, dout)
    assert lower.grad is None


def test_function_transforms_and_forward_mode():
    lower, skip, _ = make((2, 3, 4, 3))
    grad = torch.func.grad(lambda t: ops.upsample_add(t, skip).sum())(lower)
    torch.testing.assert_close(grad, torch.tensor([4.0, 2.0], dtype=torch.float64).expand(2, 3, 2, 2))
    _, tangent = torch.func.jvp(lambda t: ops.upsample_add(t, skip), (lower,), (torch.ones_like(lower),))
    torch.testing.assert_close(tangent, torch.ones_like(skip))


def test_opcheck():
    for shape in ((2, 8, 5, 6), (2, 1, 4, 4), (2, 8, 2, 2)):
        for layout in LAYOUTS.values():
            lower, skip, dout = (t.float().contiguous(memory_format=layout) for t in make(shape))
            for other in (skip.requires_grad_(), None):
                torch.library.opcheck(torch.ops.ran_ext.upsample_add, (lower.requires_grad_(), other, *shape[2:]))
            torch.library.opcheck(torch.ops.ran_ext.upsample_add_backward, (dout,))


def test_compiles_to_one_graph():
    lower, skip, _ = (t.float() for t in make((2, 8, 7, 6)))
    compiled = torch.compile(lambda a, b: ops.upsample_add(a, b) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(lower, skip), ops.upsample_add_ref(lower, skip) * 2)


def test_keeps_no_tensor():
    kept: list[Tensor] = []
    lower, skip, _ = (t.requires_grad_() for t in make((2, 3, 4, 4)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.upsample_add(lower, skip)
    assert kept == []


def test_autocast_takes_two_dtypes():
    lower, skip, _ = make((2, 4, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.upsample_add(lower.bfloat16(), skip.float()).dtype == torch.float32
        assert ops.upsample_add(lower.bfloat16(), skip.bfloat16()).dtype == torch.bfloat16


def test_bit_for_bit_from_run_to_run():
    lower, skip, dout = (t.float() for t in make((4, 32, 16, 16)))
    first = run(ops.upsample_add, lower, skip, dout)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(ops.upsample_add, lower, skip, dout), strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("lower", "skip", "size", "kind", "text"),
    [
        (torch.zeros(1, 2, 2, 2).int(), None, None, TypeError, "lower must be floating point, got torch.int32"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4).half(), None, TypeError, "and skip torch.float16"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4, device="meta"), None, ValueError, "same device"),
        (torch.zeros(2, 2, 2), None, None, ValueError, r"lower must be \(N, C, H, W\)"),
        (torch.zeros(2, 0, 2, 2), None, None, ValueError, "at least one channel"),
        (torch.zeros(1, 2, 2, 3), None, (5, 6), ValueError, r"size must be \(3 or 4, 5 or 6\) .* got \(5, 6\)"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 7, 4), None, ValueError, r"skip's height and width must be \(3 or"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 4, 4), None, ValueError, r"skip must be \[1, 2, 4, 4\]"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4), (3, 4), ValueError, r"skip must be \[1, 2, 3, 4\]"),
    ],
)
def test_errors_name_the_argument_and_the_rule(lower, skip, size, kind, text, backend):
    with set_backend(backend), pytest.raises(kind, match=f"upsample_add: .*{text}"):
        ops.upsample_add(lower, skip, size)


def test_interpolation_is_a_choice():
    for op in (ops.upsample_add, ops.upsample_add_ref):
        with pytest.raises(ValueError, match="upsample_add: interpolation must be one of 'nearest', 'bilinear', got 3"):
            op(torch.zeros(1, 2, 2, 2), interpolation=3)


@pytest.mark.parametrize(
    ("lower", "skip", "size", "kind", "text"),
    [
        (torch.zeros(2, 2, 2), None, (4, 4), ValueError, r"lower must be \(N, C, H, W\)"),
        (torch.zeros(1, 2, 2, 2), None, (5, 4), ValueError, "lower must be 3x2 for a size of 5x4"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 3), (4, 4), ValueError, r"skip must be \[1, 2, 4, 4\]"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4).half(), (4, 4), TypeError, "same dtype"),
    ],
)
def test_compiled_op_checks_for_itself(lower, skip, size, kind, text):
    with pytest.raises(kind, match=text):
        torch.ops.ran_ext.upsample_add(lower, skip, *size)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    lower = torch.ones(1, 1, 2**15, 2**14 + 1, dtype=torch.bfloat16)
    out = ops.upsample_add(lower, size=(2**16, 2**15 + 1))  # 4 GiB
    assert out[0, 0, -1, -1] == 1
    assert out.count_nonzero() == out.numel()
