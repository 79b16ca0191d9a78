"""Arguments of a wrong type, kind or size: refused with the op's and the argument's name, or taken as in PyTorch.

fuzz_ops.py draws many more; here stands one of each kind. The compiled ops, called by themselves, must not crash.
"""

import numpy as np
import pytest
import torch

from ran_ext import ops, set_backend

pytestmark = pytest.mark.usefixtures("native")

X, W, V = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.ones(3)
LOW = torch.randn(2, 3, 1, 1)
NOT_TENSORS = {
    "None": None,
    "a list": [1.0],
    "NumPy": np.ones((2, 3, 4, 4)),
    "sparse": X.to_sparse(),
    "mkldnn": X.to_mkldnn(),
    "nested": torch.nested.nested_tensor([X[0]]),
    "jagged": torch.nested.nested_tensor([X[0, 0]], layout=torch.jagged),
    "float8": X.to(torch.float8_e4m3fn),
    "complex": X.to(torch.complex64),
    "whole numbers": X.int(),
}
CALLS = {
    ("attention_gate", "trunk"): lambda t: ops.attention_gate(t, X),
    ("attention_gate", "mask"): lambda t: ops.attention_gate(X, t),
    ("conv_attention_gate", "trunk"): lambda t: ops.conv_attention_gate(t, X, W[:3, :, :1, :1]),
    ("conv_attention_gate", "x"): lambda t: ops.conv_attention_gate(X, t, W[:3, :, :1, :1]),
    ("conv_attention_gate", "weight"): lambda t: ops.conv_attention_gate(X, X, t),
    ("max_pool2d", "x"): ops.max_pool2d,
    ("upsample_add", "lower"): ops.upsample_add,
    ("upsample_add", "skip"): lambda t: ops.upsample_add(X[..., :2, :2], X if t is None else t),
    ("bn_relu", "x"): lambda t: ops.bn_relu(t, None, None, None, None),
    ("bn_relu", "weight"): lambda t: ops.bn_relu(X, t, None, None, None),
    ("bn_relu", "running_mean"): lambda t: ops.bn_relu(X, None, None, t, V, training=True),
    ("bn_relu", "running_var"): lambda t: ops.bn_relu(X, None, None, V, t, training=True),
    ("bn_relu", "num_batches_tracked"): lambda t: ops.bn_relu(X, None, None, V, V, num_batches_tracked=t),
    ("bn_relu_conv2d", "x"): lambda t: ops.bn_relu_conv2d(t, None, None, None, None, W),
    ("bn_relu_conv2d", "bn_bias"): lambda t: ops.bn_relu_conv2d(X, None, t, None, None, W),
    ("bn_relu_conv2d", "weight"): lambda t: ops.bn_relu_conv2d(X, None, None, None, None, t),
    ("bn_relu_conv2d", "bias"): lambda t: ops.bn_relu_conv2d(X, None, None, None, None, W, t),
    ("bn_relu_conv2d", "residual"): lambda t: ops.bn_relu_conv2d(X, None, None, None, None, W, residual=t),
}
OPTIONAL = {"skip", "weight", "bias", "bn_bias", "residual", "num_batches_tracked"}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", NOT_TENSORS)
@pytest.mark.parametrize(("op", "name"), CALLS)
def test_what_is_no_dense_tensor_of_floats(op, name, kind, backend):
    value = NOT_TENSORS[kind]
    optional = name in OPTIONAL and not (op.startswith(("conv", "bn_relu_conv")) and name == "weight")
    if value is None and optional:
        return
    expected = (
        f"{op}: .*{name}" if value is not None or not name.startswith("running") else "running_mean and running_var"
    )
    with set_backend(backend), pytest.raises((TypeError, ValueError), match=expected):
        CALLS[op, name](value)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [1.5, None, "2", -1, 2**31, 2**40, 2**62, 2**70, np.float32(1), float("nan"), b"1"])
@pytest.mark.parametrize("name", ["scale_factor", "stride", "padding", "size"])
def test_sizes(name, value, backend):
    calls = {
        "scale_factor": lambda: ops.attention_gate(X, LOW, value),
        "stride": lambda: ops.bn_relu_conv2d(X, None, None, None, None, W, stride=value),
        "padding": lambda: ops.bn_relu_conv2d(X, None, None, None, None, W, padding=(1, value)),
        "size": lambda: ops.upsample_add(X, size=(value, 7)),
    }
    with set_backend(backend), pytest.raises((TypeError, ValueError), match=f"^[a-z_0-9]+: {name} must be"):
        calls[name]()


@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("value", ["0.1", 1j, [0.1], torch.tensor(0.1)])
def test_numbers(name, value):
    with pytest.raises(TypeError, match=f"bn_relu: {name} must be a number"):
        ops.bn_relu(X, None, None, V.clone(), V.clone(), training=True, **{name: value})


def test_flags():
    for value in ("no", None, 2, torch.tensor(True)):
        with pytest.raises(TypeError, match="bn_relu: training must be True or False"):
            ops.bn_relu(X, None, None, None, None, training=value)
        with pytest.raises(TypeError, match="max_pool2d: ceil_mode must be True or False"):
            ops.max_pool2d(X, value)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_numpy_numbers_are_taken(backend):
    two, small = np.int64(2), np.float32(0.25)
    with set_backend(backend):
        out = ops.bn_relu_conv2d(X, None, None, V * 0, V, W, stride=two, padding=(two, np.int32(1)), eps=small)
        assert torch.equal(out, ops.bn_relu_conv2d(X, None, None, V * 0, V, W, stride=2, padding=(2, 1), eps=0.25))
        assert torch.equal(ops.attention_gate(X, X[..., :2, :2], two), ops.attention_gate(X, X[..., :2, :2], 2))
        assert torch.equal(ops.upsample_add(X, size=np.array([7, 8])), ops.upsample_add(X, size=(7, 8)))
        assert torch.equal(ops.max_pool2d(X, np.bool_(False)), ops.max_pool2d(X, False))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("scale", [4, 5, 2**20, 2**31 - 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_factor_beyond_the_trunk_is_the_trunks_size(layout, scale, backend):
    leaves = [t.contiguous(memory_format=layout).requires_grad_() for t in (X.clone(), LOW.clone())]
    with set_backend(backend):
        out = ops.attention_gate(*leaves, scale)
        out.square().sum().backward()
        both = ops.conv_attention_gate(*leaves, W[:3, :, :1, :1] * 0, None, scale)
    wanted = (1 + LOW.sigmoid()) * X
    torch.testing.assert_close(out, wanted)
    slope = LOW.sigmoid() * (1 - LOW.sigmoid())
    torch.testing.assert_close(leaves[1].grad, (2 * wanted * X).sum((2, 3), keepdim=True) * slope)
    torch.testing.assert_close(both, 1.5 * X)
    second = torch.autograd.grad(ops.attention_gate(*leaves, scale).square().sum(), leaves[1], create_graph=True)[0]
    assert torch.autograd.grad(second.sum(), leaves[1])[0].shape == LOW.shape


def test_eps_as_in_pytorch():
    for value, training in ((0.0, True), (-1e-5, True), (-1e-5, False)):
        with pytest.raises(ValueError, match="bn_relu: eps must be"):
            ops.bn_relu(X, None, None, V.clone(), V.clone(), training=training, eps=value)
    assert ops.bn_relu(X, None, None, V, V, eps=0).isfinite().all()


def test_running_statistics_of_two_dtypes():
    with pytest.raises(TypeError, match=r"bn_relu: running_var must have running_mean's dtype torch.float32, got"):
        ops.bn_relu(X, None, None, V.clone(), V.double(), training=True)
    with pytest.raises(TypeError, match="bn_relu: the running mean and variance must have the same dtype"):
        torch.ops.ran_ext.bn_relu(X, None, None, None, None, False, [V.clone(), V.double()], 0.1, 1e-5)
    eighths = [V.to(torch.float8_e4m3fn)] * 2
    with pytest.raises(TypeError, match="running statistics must be float32, float64, bfloat16 or float16"):
        torch.ops.ran_ext.bn_relu(X, None, None, None, None, False, eighths, 0.1, 1e-5)


@pytest.mark.parametrize("huge", [2**31, 2**33, 2**61, 2**62, 2**63 - 1, -1, 0])
def test_compiled_ops_refuse_or_bound_sizes_themselves(huge):
    native, last = torch.ops.ran_ext, X.contiguous(memory_format=torch.channels_last)
    for trunk in (X, last):
        if huge > 0:
            torch.testing.assert_close(native.attention_gate(trunk, LOW, huge), (1 + LOW.sigmoid()) * X)
            native.attention_gate_backward(trunk, trunk, LOW, huge)
        else:
            with pytest.raises(ValueError, match="scale_factor must be at least 1"):
                native.attention_gate(trunk, LOW, huge)
        with pytest.raises(ValueError, match="upsample_add: lower must be"):
            native.upsample_add(trunk, None, huge, 8)
        with pytest.raises(ValueError, match="max_pool2d: dout must be"):
            native.max_pool2d_backward(trunk, torch.zeros(X.shape, dtype=torch.uint8), 8, huge)
    for stride, padding in (([huge, 1], [0, 0]), ([1, 1], [-1, 0]), ([1], [0, 0]), ([1, 1], [1, 2**62])):
        with pytest.raises(ValueError, match=r"bn_relu_conv2d: (stride|padding) must be a pair, each from"):
            convolution(X, stride=stride, padding=padding)


def convolution(x, *, mean=None, var=None, weight=W, residual=None, stride=(1, 1), padding=(0, 0)):
    """The compiled op by itself."""
    options = {"mean": mean, "var": var, "residual": residual, "stride": list(stride), "padding": list(padding)}
    return torch.ops.ran_ext.bn_relu_conv2d(x, weight, running=[], **options)


def test_compiled_ops_want_both_statistics_and_fitting_tensors():
    both = "mean and var must be given both or neither"
    with pytest.raises(ValueError, match=both):
        torch.ops.ran_ext.bn_relu(X, None, None, V, None, False, [], None, 1e-5)
    with pytest.raises(ValueError, match=both):
        convolution(X, mean=V)
    with pytest.raises(ValueError, match=r"residual must be \[2, 5, 2, 2\], got \[2, 5, 4, 4\]"):
        convolution(X, residual=torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match="is smaller than the kernel"):
        convolution(X[..., :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_saturated_gate_times_an_infinity_is_nan_where_pytorchs_is(layout, dtype):
    mask = torch.tensor([-1000.0, -200.0, -60.0, -3.0, 0.0, 3.0, 20.0, 60.0, 200.0, float("inf")], dtype=dtype)
    trunk = torch.ones(1, 10, 4, 4, dtype=dtype)
    trunk[..., 1, 1], trunk[..., 3, 2] = float("inf"), -float("inf")
    for scale, at in ((1, (4, 4)), (2, (2, 2)), (4, (1, 1))):
        grown = mask.view(1, 10, 1, 1).expand(1, 10, *at)
        found = []
        for op in (ops.attention_gate, ops.attention_gate_ref):
            leaves = [t.clone(memory_format=layout).requires_grad_() for t in (trunk, grown.contiguous())]
            op(*leaves, scale).sum().backward()
            found.append(leaves[1].grad)
        torch.testing.assert_close(*found, equal_nan=True, rtol=0.02, atol=1e-4)
