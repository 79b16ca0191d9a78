"""``ops.conv2d``: PyTorch's values, gradients and errors, whatever it runs on."""

import pytest
import torch
from accuracy import assert_accurate
from torch.nn import functional as F

from ran_ext import ops, set_backend, set_conv3x3

# x, weight, and the keyword arguments
CASES = {
    "3x3": ((4, 48, 9, 14), (40, 48, 3, 3), {"padding": 1}),
    "3x3 same": ((4, 64, 8, 8), (64, 64, 3, 3), {"padding": "same"}),
    "3x3, wide": ((8, 64, 15, 15), (96, 64, 3, 3), {"padding": (1, 1)}),
    "3x3 stride 2": ((2, 32, 9, 9), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
    "few channels": ((2, 3, 12, 12), (32, 3, 3, 3), {"padding": 1}),
    "5x5": ((2, 16, 9, 9), (16, 16, 5, 5), {"padding": 2}),
    "1x1": ((2, 32, 8, 8), (16, 32, 1, 1), {}),
    "valid": ((2, 32, 8, 8), (16, 32, 3, 3), {"padding": "valid"}),
    "groups": ((2, 32, 8, 8), (32, 8, 3, 3), {"padding": 1, "groups": 4}),
    "dilated": ((2, 32, 8, 8), (32, 32, 3, 3), {"padding": 2, "dilation": 2}),
}


def run(op, x, weight, bias, dout, kwargs):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    out = op(*leaves, **kwargs)
    out.backward(dout.to(out))
    return out.detach(), *(t.grad for t in leaves if t is not None)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, layout, with_bias):
    size, kernel, kwargs = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype).to(memory_format=layout)
    weight = (torch.randn(kernel) / (kernel[1] * 9) ** 0.5).to(dtype).to(memory_format=layout)
    bias = torch.randn(kernel[0]).to(dtype) if with_bias else None
    dout = torch.randn(F.conv2d(x.float(), weight.float(), None, **kwargs).shape).to(dtype).to(memory_format=layout)
    ours = run(ops.conv2d, x, weight, bias, dout, kwargs)
    eager = run(F.conv2d, x, weight, bias, dout, kwargs)
    exact = run(F.conv2d, *(None if t is None else t.double() for t in (x, weight, bias)), dout, kwargs)
    for name, *of in zip(("out", "dx", "dweight", "dbias"), ours, eager, exact, strict=False):
        assert of[0].dtype == dtype
        assert of[0].stride() == of[1].stride()
        assert_accurate(name, *of)


@pytest.mark.usefixtures("native")
def test_the_kernel_runs_where_it_should():
    """By its error, which is not the library's."""
    torch.manual_seed(0)
    x = torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
    library = F.conv2d(x, weight, padding=1)
    with set_conv3x3("library"):
        assert torch.equal(ops.conv2d(x, weight, padding=1), library)
    with set_backend("reference"):
        assert torch.equal(ops.conv2d(x, weight, padding=1), library)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert not torch.equal(ops.conv2d(x, weight, padding=1), library)
    assert torch.equal(ops.conv2d(x.contiguous(), weight, padding=1), F.conv2d(x.contiguous(), weight, padding=1))


def test_derivatives_of_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True)

    def op(x, weight, bias):
        return ops.conv2d(x.to(memory_format=torch.channels_last), weight, bias, padding=1)

    assert torch.autograd.gradcheck(op, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (x, weight, bias), fast_mode=True)


@pytest.mark.usefixtures("native")
def test_of_single_precision_backward_can_be_differentiated():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 32, 3, 3).requires_grad_()
    found = []
    for op in (ops.conv2d, F.conv2d):
        [dx] = torch.autograd.grad(op(x, weight, padding=1).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.usefixtures("native")
def test_opcheck_and_compile():
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(32, 32, 3, 3, requires_grad=True), torch.randn(32, requires_grad=True)
    torch.library.opcheck(torch.ops.ran_ext.conv2d, (x, weight, bias, [1, 1], [1, 1], 0))
    compiled = torch.compile(lambda *args: ops.conv2d(*args, padding=1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), ops.conv2d(x, weight, bias, padding=1))


def test_autocast_as_pytorch():
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(32, 32, 3, 3) / 17, torch.randn(32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = ops.conv2d(x, weight, bias, padding=1), F.conv2d(x, weight, bias, padding=1)
    assert ours.dtype == eager.dtype == torch.bfloat16
    exact = F.conv2d(x.bfloat16().double(), weight.bfloat16().double(), bias.bfloat16().double(), padding=1)
    assert_accurate("out", ours, eager, exact)


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_images(batch):
    x, weight = torch.randn(batch, 32, 8, 8).to(memory_format=torch.channels_last), torch.randn(16, 32, 3, 3)
    torch.testing.assert_close(ops.conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
    alone = torch.randn(32, 8, 8)
    torch.testing.assert_close(ops.conv2d(alone, weight, padding=1), F.conv2d(alone, weight, padding=1))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": None}, TypeError, "conv2d: x must be a tensor, got None"),
        ({"weight": torch.randn(16, 31, 3, 3)}, ValueError, "conv2d: weight must be .C_out, C_in / groups"),
        ({"weight": torch.randn(16, 32, 3, 3).double()}, TypeError, "conv2d: weight must have x's dtype"),
        ({"bias": torch.randn(15)}, ValueError, r"conv2d: bias must be \[16\]"),
        ({"stride": 0}, ValueError, "conv2d: stride must be"),
        ({"padding": -1}, ValueError, "conv2d: padding must be"),
        ({"groups": 0}, ValueError, "conv2d: groups must be"),
        ({"weight": torch.randn(16, 32, 9, 9)}, ValueError, "conv2d: x .* is smaller than the kernel"),
    ],
)
def test_wrong_arguments(changed, error, says):
    args = {"x": torch.randn(2, 32, 8, 8), "weight": torch.randn(16, 32, 3, 3), **changed}
    with pytest.raises(error, match=says):
        ops.conv2d(**args)
