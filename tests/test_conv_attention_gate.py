"""The gate with the mask's last convolution against plain PyTorch: values, gradients, autocast, compile, errors."""

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, MEANS, assert_accurate, strided_views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ran_ext import _backend, ops, set_backend

pytestmark = pytest.mark.usefixtures("native")

NAMES = ("out", "dtrunk", "dx", "dweight", "dbias")


def make(shape: tuple[int, ...], c_in: int, scale: int, bias: bool = True) -> tuple[list[Tensor | None], Tensor]:
    """trunk, x, weight, bias and the gradient of the output."""
    n, c, h, w = shape
    weight = torch.randn(c, c_in, 1, 1, dtype=torch.float64) / c_in**0.5
    x = torch.randn(n, c_in, -(-h // scale), -(-w // scale), dtype=torch.float64)
    trunk, dout = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    return [trunk, x, weight, torch.randn(c, dtype=torch.float64) if bias else None], dout


def run(fn, inputs: list[Tensor | None], dout: Tensor, scale: int) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = fn(*leaves, scale)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def check(shape, c_in, scale, dtype, layout, bias: bool = True, times: float = 2, mean: float = 0.0) -> None:
    (trunk, x, *rest), dout = make(shape, c_in, scale, bias)
    # Positive, so that the sums over pixels do not cancel, which would leave rounding alone to be compared.
    inputs, dout = [trunk.abs() + abs(mean), x.abs(), *rest], dout.abs()
    cast = [t if t is None else t.to(dtype) for t in inputs]
    exact_in, dout = [t if t is None else t.double() for t in cast], dout.to(dtype)
    cast = [t if t is None or t.dim() != 4 else t.contiguous(memory_format=layout) for t in cast]
    exact = run(ops.conv_attention_gate_ref, exact_in, dout.double(), scale)
    eager = run(ops.conv_attention_gate_ref, cast, dout, scale)
    ours = run(ops.conv_attention_gate, cast, dout, scale)
    for name, a, b, c in zip(NAMES, ours, eager, exact, strict=False):
        assert_accurate(name, a, b, c, times)
    assert ours[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 40, 6, 5)])
def test_values_and_gradients(shape, scale, dtype, layout):
    check(shape, 8, scale, dtype, LAYOUTS[layout], times=4 if shape == (1, 1, 1, 1) else 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    c_in=st.integers(1, 40),
    scale=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
    bias=st.booleans(),
    mean=st.sampled_from(MEANS),
)
def test_any_shape(shape, c_in, scale, dtype, layout, bias, mean):
    check(shape, c_in, scale, dtype, layout, bias, times=4, mean=mean)


def test_sliced_expanded_and_transposed_inputs():
    for trunk in strided_views():
        c = trunk.shape[1]
        x = torch.randn(trunk.shape[0], 8, -(-trunk.shape[2] // 2), -(-trunk.shape[3] // 2) + 3)[..., 3:]
        weight = torch.randn(8, c, 1, 1).transpose(0, 1)
        expected = ops.conv_attention_gate_ref(trunk, x, weight, None, 2)
        torch.testing.assert_close(ops.conv_attention_gate(trunk, x, weight, None, 2), expected)


def test_empty_batch():
    inputs, _ = make((0, 3, 4, 4), 5, 2)
    leaves = [t.requires_grad_() for t in inputs]
    ops.conv_attention_gate(*leaves, 2).sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


def test_gradcheck_and_second_derivatives():
    for scale, bias in ((1, True), (2, False)):
        inputs, _ = make((2, 3, 3, 4), 2, scale, bias)
        leaves = [t.requires_grad_() for t in inputs if t is not None]
        assert torch.autograd.gradcheck(lambda *t, s=scale: ops.conv_attention_gate(*t, scale_factor=s), leaves)
        assert torch.autograd.gradgradcheck(lambda *t, s=scale: ops.conv_attention_gate(*t, scale_factor=s), leaves)


def test_function_transforms():
    (trunk, x, weight, bias), _ = make((2, 3, 4, 4), 5, 1)
    grad = torch.func.grad(lambda t: ops.conv_attention_gate(t, x, weight, bias).sum())(trunk)
    torch.testing.assert_close(grad, 1 + F.conv2d(x, weight, bias).sigmoid())


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_tensors_get_no_gradient(frozen):
    inputs, dout = make((2, 4, 6, 6), 3, 2)
    leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    ops.conv_attention_gate(*leaves, 2).backward(dout)
    expected = run(ops.conv_attention_gate_ref, inputs, dout, 2)[1:]
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is None) == (i == frozen)
        if i != frozen:
            torch.testing.assert_close(leaf.grad, gradient)


def test_opcheck():
    for layout in LAYOUTS.values():
        inputs, _ = make((2, 8, 5, 6), 4, 2)
        tensors = [t.float() if t.dim() != 4 else t.float().contiguous(memory_format=layout) for t in inputs]
        leaves = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.ran_ext.conv_attention_gate, (*leaves, 2))


def test_compiles_to_one_graph():
    tensors = [t.float() for t in make((2, 8, 6, 6), 4, 2)[0]]
    compiled = torch.compile(lambda *t: ops.conv_attention_gate(*t, 2) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), ops.conv_attention_gate_ref(*tensors, 2) * 2)


@pytest.mark.parametrize("wide_trunk", [True, False])
def test_autocast_as_eager_pytorch(wide_trunk):
    inputs, dout = make((2, 16, 8, 8), 8, 2)
    tensors = [t.float() for t in inputs]
    tensors[0] = tensors[0] if wide_trunk else tensors[0].bfloat16()
    results = []
    for op in (ops.conv_attention_gate, ops.conv_attention_gate_ref):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            out = op(*leaves, 2)
        out.backward(dout.to(out.dtype))
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        results.append([out, *(leaf.grad for leaf in leaves)])
    exact = run(ops.conv_attention_gate_ref, [t.double() for t in tensors], dout, 2)
    assert results[0][0].dtype == (torch.float32 if wide_trunk else torch.bfloat16)
    for name, ours, eager, wanted in zip(NAMES, *results, exact, strict=True):
        assert_accurate(name, ours, eager, wanted)


def test_keeps_trunk_x_weights_and_the_mask_only():
    kept: list[Tensor] = []
    tensors = [t.float().requires_grad_() for t in make((2, 4, 8, 8), 3, 2)[0]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.conv_attention_gate(*tensors, 2)
    others = [t for t in kept if t.data_ptr() not in {leaf.data_ptr() for leaf in tensors}]
    assert [tuple(t.shape) for t in others] == [(2, 4, 4, 4)]


def test_counts_the_convolution():
    tensors = [t.float().requires_grad_() for t in make((2, 8, 8, 8), 4, 2)[0]]
    totals = []
    for op in (ops.conv_attention_gate, ops.conv_attention_gate_ref):
        with FlopCounterMode(display=False) as counter:
            op(*tensors, 2).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changes", "scale", "kind", "text"),
    [
        ({"x": torch.zeros(1, 4, 3, 3)}, 1, ValueError, r"x must be \[1, 4, 5, 5\] for trunk \[1, 8, 5, 5\]"),
        ({"x": torch.zeros(1, 4, 2, 2)}, 2, ValueError, r"x must be \[1, 4, 3, 3\] .*got x \[1, 4, 2, 2\]"),
        ({"x": torch.zeros(4, 5, 5)}, 1, ValueError, r"trunk and x must be \(N, C, H, W\)"),
        ({"weight": torch.zeros(8, 4, 3, 3)}, 1, ValueError, r"weight must be \[8, 4, 1, 1\]"),
        ({"bias": torch.zeros(4)}, 1, ValueError, r"bias must be \[8\] .*got \[4\]"),
        ({"weight": torch.zeros(8, 4, 1, 1).half()}, 1, TypeError, "one floating-point dtype, got trunk torch.float32"),
        ({"trunk": torch.zeros(1, 8, 5, 5, device="meta")}, 1, ValueError, "same device, got trunk on meta"),
        ({}, 0, ValueError, "whole number >= 1, got 0"),
    ],
)
def test_errors_name_the_argument_and_the_rule(changes, scale, kind, text, backend):
    inputs = {"trunk": torch.zeros(1, 8, 5, 5), "x": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(8, 4, 1, 1)}
    with set_backend(backend), pytest.raises(kind, match=f"conv_attention_gate: .*{text}"):
        ops.conv_attention_gate(**(inputs | changes), scale_factor=scale)


def test_compiled_op_checks_for_itself():
    trunk, x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(1, 4, 5, 5), torch.zeros(8, 4, 1, 1)
    with pytest.raises(ValueError, match="x must be"):
        torch.ops.ran_ext.conv_attention_gate(trunk, x[..., 1:], weight, None, 1)
    with pytest.raises(ValueError, match="weight must be"):
        torch.ops.ran_ext.conv_attention_gate(trunk, x, weight[1:], None, 1)
    with pytest.raises(TypeError, match="same dtype"):
        torch.ops.ran_ext.conv_attention_gate(trunk, x, weight.half(), None, 1)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        torch.ops.ran_ext.conv_attention_gate(trunk, x, weight, torch.zeros(4), 1)
    assert _backend._C is not None
