"""The attention gate against plain PyTorch: values, gradients, layouts, derivatives of derivatives, compile, errors."""

import large
import pytest
import torch
from accuracy import DTYPES, LAYOUTS, MEANS, assert_accurate, strided_views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ran_ext import _backend, ops, set_backend

pytestmark = pytest.mark.usefixtures("native")


def make(shape: tuple[int, ...], scale: int, spread: float = 3.0, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = shape
    mask = torch.randn(n, c, -(-h // scale), -(-w // scale), dtype=torch.float64) * spread
    return torch.randn(shape, dtype=torch.float64) + mean, mask, torch.randn(shape, dtype=torch.float64)


def run(fn, trunk: Tensor, mask: Tensor, dout: Tensor, scale: int) -> list[Tensor]:
    trunk, mask = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (trunk, mask))
    out = fn(trunk, mask, scale)
    out.backward(dout)
    return [out.detach(), trunk.grad, mask.grad]


def check(
    shape: tuple[int, ...], scale: int, dtype: torch.dtype, layout: torch.memory_format, mean: float = 0.0
) -> None:
    exact_in = [t.to(dtype).double() for t in make(shape, scale, mean=mean)]
    cast = [t.to(dtype).contiguous(memory_format=layout) for t in exact_in]
    exact = run(ops.attention_gate_ref, *exact_in, scale)
    eager = run(ops.attention_gate_ref, *cast, scale)
    ours = run(ops.attention_gate, *cast, scale)
    for name, a, b, c in zip(("out", "dtrunk", "dmask"), ours, eager, exact, strict=True):
        assert_accurate(name, a, b, c)
    assert ours[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 37, 6, 5), (1, 64, 33, 31)])
def test_values_and_gradients(shape, scale, dtype, layout):
    check(shape, scale, dtype, LAYOUTS[layout])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    scale=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
    mean=st.sampled_from(MEANS),
)
def test_any_shape(shape, scale, dtype, layout, mean):
    check(shape, scale, dtype, layout, mean)


def bilinear(trunk: Tensor, mask: Tensor, scale: int) -> Tensor:
    return ops.attention_gate(trunk, mask, scale, interpolation="bilinear")


def plain_bilinear(trunk: Tensor, mask: Tensor, scale: int) -> Tensor:
    return (1 + torch.sigmoid(F.interpolate(mask, size=trunk.shape[2:], mode="bilinear"))) * trunk


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 2, 3, 100])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 1, 1, 1), (3, 37, 1, 9), (1, 3, 34, 2), (1, 16, 5, 70)])
def test_bilinear_values_and_gradients(shape, scale, dtype, layout, backend):
    """Up-sampled as PyTorch does, then gated; of odd sizes too."""
    check_bilinear(shape, scale, dtype, LAYOUTS[layout], backend=backend)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24)),
    scale=st.integers(2, 6),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
)
def test_bilinear_values_and_gradients_of_any_shape(shape, scale, dtype, layout):
    check_bilinear(shape, scale, dtype, layout, times=4)


def check_bilinear(
    shape: tuple[int, ...],
    scale: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    times: float = 2,
    backend: str = "native",
) -> None:
    inputs = [t.to(dtype).contiguous(memory_format=layout) for t in make(shape, scale)]
    exact = run(plain_bilinear, *(t.double() for t in inputs), scale)
    with set_backend(backend):
        found, eager = run(bilinear, *inputs, scale), run(plain_bilinear, *inputs, scale)
    for name, a, b, c in zip(("out", "dtrunk", "dmask"), found, eager, exact, strict=True):
        assert_accurate(name, a, b, c, times)
    assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bilinear_masks_are_differentiated_twice_and_kept_small(layout):
    inputs = [t.contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for t in make((2, 3, 5, 4), 2)[:2]]
    assert torch.autograd.gradcheck(lambda t, m: bilinear(t, m, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda t, m: bilinear(t, m, 2), inputs)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bilinear(*inputs, 2)
    assert sorted(tuple(t.shape) for t in kept) == [(2, 3, 3, 2), (2, 3, 5, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bilinear_mask_is_never_written_out(layout):
    inputs = [t.contiguous(memory_format=LAYOUTS[layout]) for t in make((2, 8, 16, 16), 2)]
    with torch.profiler.profile() as profile:
        run(bilinear, *inputs, 2)
    names = {event.key for event in profile.key_averages()}
    assert "ran_ext::attention_gate_backward" in names
    assert not {name for name in names if "upsample" in name}


@pytest.mark.parametrize("where", ["trunk", "mask", "dout"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_around_bilinear_masks_as_in_pytorch(dtype, layout, where):
    """Each in turn at a corner, at an edge and inside: also where a neighbour's weight is 0, which makes it NaN."""
    for shape, scale in (((1, 17, 9, 9), 3), ((1, 4, 8, 18), 2), ((1, 1, 25, 9), 2), ((1, 2, 1, 5), 2)):
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in (0.0, 0.3, 0.5, 1.0):
                inputs = dict(zip(("trunk", "mask", "dout"), make(shape, scale), strict=True))
                inputs["mask"].clamp_(-4, 4)  # where a sigmoid rounds to 1 in 16 bits, PyTorch makes infinity NaN
                spoilt = inputs[where]
                spoilt[..., round(place * (spoilt.shape[2] - 1)), round(place * (spoilt.shape[3] - 1))] = value
                ours, eager = (
                    run(op, *(t.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for t in inputs.values()), scale)
                    for op in (bilinear, plain_bilinear)
                )
                for a, b in zip(ours, eager, strict=True):
                    assert torch.equal(a.isnan(), b.isnan())
                    assert torch.equal(a.isposinf(), b.isposinf())
                    assert torch.equal(a.isneginf(), b.isneginf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bilinear_neighbours_are_pytorchs(dtype):
    """By the rounding of a pixel's place: told by where NaN comes through at weight 0."""
    for high in range(1, 120):
        for scale in (2, 3, 5):
            low = -(-high // scale)
            mask = torch.zeros(low, low, dtype=dtype).fill_diagonal_(torch.nan).reshape(low, 1, 1, low)
            trunk = torch.ones(low, 1, 1, high, dtype=dtype)
            assert torch.equal(bilinear(trunk, mask, scale).isnan(), plain_bilinear(trunk, mask, scale).isnan())


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)])
def test_empty_with_a_bilinear_mask(shape):
    trunk, mask, dout = make(shape, 2)
    out, dtrunk, dmask = run(bilinear, trunk, mask, dout, 2)
    assert (out.shape, dtrunk.shape, dmask.shape) == (trunk.shape, trunk.shape, mask.shape)
    assert not dmask.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 57, 31), (1, 24, 90, 33), (1, 1, 200, 70)])
def test_bilinear_masks_bit_for_bit_with_any_number_of_threads(shape, layout):
    """A part of the rows begins between two rows of the mask, and takes the sum that the part before began."""
    inputs = [t.float().contiguous(memory_format=LAYOUTS[layout]) for t in make(shape, 3)]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(run(bilinear, *inputs, 3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bilinear_masks_of_strided_inputs():
    for trunk in strided_views():
        low = torch.randn(-(-trunk.shape[3] // 2), -(-trunk.shape[2] // 2), *trunk.shape[1::-1]).permute(3, 2, 1, 0)
        dout = torch.randn(()).expand(trunk.shape)
        for a, b in zip(run(bilinear, trunk, low, dout, 2), run(plain_bilinear, trunk, low, dout, 2), strict=True):
            torch.testing.assert_close(a, b)


def test_bilinear_masks_under_transforms_compile_and_autocast():
    trunk, mask, _ = (t.float() for t in make((2, 3, 5, 4), 2))
    want = plain_bilinear(trunk, mask, 2)
    mapped = torch.func.vmap(lambda t, m: bilinear(t[None], m[None], 2)[0])(trunk, mask)
    torch.testing.assert_close(mapped, want)
    _, tangent = torch.func.jvp(lambda t: bilinear(t, mask, 2), (trunk,), (trunk,))
    torch.testing.assert_close(tangent, want)
    compiled = torch.compile(lambda t, m: bilinear(t, m, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(trunk, mask), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert bilinear(trunk, mask.bfloat16(), 2).dtype == torch.float32


def test_interpolation_is_a_choice():
    trunk, mask = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match="attention_gate: interpolation must be one of 'nearest', 'bilinear'"):
        ops.attention_gate(trunk, mask, 2, "bi")
    with pytest.raises(ValueError, match=r"attention_gate: mask must be \[1, 2, 2, 2\]"):
        ops.attention_gate(trunk, trunk, 2, "bilinear")


def test_sliced_expanded_and_transposed_inputs():
    for trunk in strided_views():
        mask = torch.randn(trunk.shape[::-1]).permute(3, 2, 1, 0)
        torch.testing.assert_close(ops.attention_gate(trunk, mask), ops.attention_gate_ref(trunk, mask))
        low = torch.randn(*trunk.shape[:2], -(-trunk.shape[2] // 2), -(-trunk.shape[3] // 2))
        torch.testing.assert_close(ops.attention_gate(trunk, low, 2), ops.attention_gate_ref(trunk, low, 2))


def test_gradient_that_is_not_contiguous():
    trunk, mask = (torch.randn(2, 8, 6, 6, requires_grad=True) for _ in range(2))
    out = ops.attention_gate(trunk, mask)
    (grad,) = torch.autograd.grad(out.transpose(1, 3).sum(), trunk, retain_graph=True)
    expanded = torch.autograd.grad(out, mask, torch.ones(()).expand_as(out))[0]
    torch.testing.assert_close(grad, 1 + mask.sigmoid())
    torch.testing.assert_close(expanded, trunk * mask.sigmoid() * (1 - mask.sigmoid()))


def test_empty():
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        trunk, mask = (torch.zeros(shape, requires_grad=True) for _ in range(2))
        ops.attention_gate(trunk, mask).sum().backward()
        assert trunk.grad.shape == mask.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_subnormal_numbers_as_in_pytorch(dtype):
    inf, tiny = float("inf"), torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([float("nan"), inf, -inf, 0.0, -100.0, 100.0, 88.8, -88.8, 1e-30], dtype=dtype)
    trunk, mask = (t.reshape(-1) for t in torch.meshgrid(values, values, indexing="ij"))
    torch.testing.assert_close(ops.attention_gate(trunk, mask), ops.attention_gate_ref(trunk, mask), equal_nan=True)
    trunk = torch.full((70,), tiny, dtype=dtype)
    assert torch.equal(ops.attention_gate(trunk, torch.full_like(trunk, -inf)), trunk)
    one, mask = torch.ones(4, dtype=dtype), torch.tensor([-inf, -1e4, 1e4, inf], dtype=dtype)
    ours, eager = (run(op, one, mask, one, 1) for op in (ops.attention_gate, ops.attention_gate_ref))
    torch.testing.assert_close(ours, eager)


def test_gradcheck_and_second_derivatives():
    for scale in (1, 2):
        trunk, mask, _ = make((2, 3, 3, 4), scale)
        inputs = (trunk.requires_grad_(), mask.requires_grad_())
        assert torch.autograd.gradcheck(lambda t, m, s=scale: ops.attention_gate(t, m, s), inputs)
        assert torch.autograd.gradgradcheck(lambda t, m, s=scale: ops.attention_gate(t, m, s), inputs)


def test_function_transforms_and_forward_mode():
    trunk, mask, _ = make((2, 3, 4, 4), 1)
    grad = torch.func.grad(lambda t: ops.attention_gate(t, mask).sum())(trunk)
    torch.testing.assert_close(grad, 1 + mask.sigmoid())
    mapped = torch.func.vmap(lambda t, m: ops.attention_gate(t, m))(trunk, mask)
    torch.testing.assert_close(mapped, ops.attention_gate_ref(trunk, mask))
    _, tangent = torch.func.jvp(lambda t: ops.attention_gate(t, mask), (trunk,), (torch.ones_like(trunk),))
    torch.testing.assert_close(tangent, 1 + mask.sigmoid())


def test_opcheck():
    for scale, layout in ((1, torch.contiguous_format), (2, torch.contiguous_format), (2, torch.channels_last)):
        trunk, mask, dout = (t.float().contiguous(memory_format=layout) for t in make((2, 8, 5, 6), scale))
        torch.library.opcheck(torch.ops.ran_ext.attention_gate, (trunk.requires_grad_(), mask.requires_grad_(), scale))
        torch.library.opcheck(torch.ops.ran_ext.attention_gate_backward, (dout, trunk.detach(), mask.detach(), scale))
        leaves = trunk.detach().requires_grad_(), mask.detach().requires_grad_()
        torch.library.opcheck(torch.ops.ran_ext.attention_gate, (*leaves, scale, True))
        dense = dout, trunk.detach(), mask.detach(), scale, True
        torch.library.opcheck(torch.ops.ran_ext.attention_gate_backward, dense)


def test_compiles_to_one_graph():
    trunk, mask, _ = (t.float() for t in make((2, 8, 6, 6), 2))
    compiled = torch.compile(lambda t, m: ops.attention_gate(t, m, 2) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(trunk, mask), ops.attention_gate_ref(trunk, mask, 2) * 2)


def test_autocast_takes_two_dtypes():
    trunk, mask = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention_gate(trunk, mask).dtype == torch.float32


def test_bit_for_bit_from_run_to_run():
    trunk, mask, dout = (t.float() for t in make((4, 32, 16, 16), 2))
    first = run(ops.attention_gate, trunk, mask, dout, 2)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(ops.attention_gate, trunk, mask, dout, 2), strict=True))


def test_keeps_trunk_and_mask_only():
    kept: list[Tensor] = []
    trunk, mask = (torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.attention_gate(trunk, mask)
    assert {t.data_ptr() for t in kept} == {trunk.data_ptr(), mask.data_ptr()}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("trunk", "mask", "scale", "kind", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 3), 1, ValueError, r"same shape, got trunk \[2, 3\] and mask \[1, 3\]"),
        (torch.zeros(2), torch.zeros(2).half(), 1, TypeError, "same floating-point dtype, got trunk torch.float32"),
        (torch.zeros(2).int(), torch.zeros(2).int(), 1, TypeError, "trunk must be floating point, got torch.int32"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 2, ValueError, r"must be \(N, C, H, W\)"),
        (torch.zeros(1, 2, 5, 5), torch.zeros(1, 2, 2, 2), 2, ValueError, r"mask must be \[1, 2, 3, 3\]"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), 0, ValueError, "whole number >= 1, got 0"),
        (torch.zeros(2), torch.zeros(2, device="meta"), 1, ValueError, "same device"),
    ],
)
def test_errors_name_the_argument_and_the_rule(trunk, mask, scale, kind, text, backend):
    with set_backend(backend), pytest.raises(kind, match=f"attention_gate: .*{text}"):
        ops.attention_gate(trunk, mask, scale)


def test_compiled_op_checks_for_itself():
    with pytest.raises(ValueError, match="same shape"):
        torch.ops.ran_ext.attention_gate(torch.zeros(2, 3), torch.zeros(1, 3), 1)
    assert _backend._C is not None


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    trunk = large.zeros(*large.MORE_THAN_INT32)
    trunk[0, 0, -1] = 1
    out = ops.attention_gate(trunk, torch.zeros(1, 1, 2**13, 2**12 + 1, dtype=torch.bfloat16), 8)
    assert out[0, 0, -1, -1] == 1.5
    assert out[0, 0, -1].float().mean() == 1.5
