"""The ops on a GPU, by the CPU tests' own rules and helpers; and what only a GPU has: streams, graphs, devices.

The helpers make their tensors on the default device, which here is the GPU.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import test_attention_gate as gate
import test_bn_relu as norm
import test_bn_relu_conv as conv
import test_conv_attention_gate as conv_gate
import test_max_pool as pool
import test_nn as modules
import test_upsample_add as upsample
import torch
from accuracy import DTYPES, LAYOUTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ran_ext import _backend, ops, set_backend, set_bn_relu, set_conv1x1, set_conv3x3
from ran_ext._explain import layers
from ran_ext._paths import paths
from ran_ext.nn import AttentionModule, BNReLUConv2d

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

#: 1x1 and 3x3 convolutions that the fused kernels take, and others: n, c_in, h, w, c_out, kernel, stride, padding.
CASES = [
    *conv.CASES,
    (2, 8, 7, 5, 24, 1, 1, 0),
    (2, 16, 7, 5, 24, 1, 2, 0),
    (4, 128, 16, 16, 512, 1, 1, 0),
    (4, 1024, 4, 4, 64, 1, 1, 0),
    (3, 24, 9, 7, 40, 3, 1, 1),
    (3, 24, 9, 6, 40, 3, 2, 1),
    (2, 72, 8, 5, 136, 3, 2, 0),
    (4, 128, 16, 16, 128, 3, 1, 1),
    (16, 64, 4, 4, 64, 3, 1, 1),
]
#: Library convolutions and streamed normalisation; every fused and resident kernel that takes the shape.
CHOICES = {"library": ("library", "streaming"), "fused": ("fused", "resident")}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The GPU as default device, its kernels asked for by name, and the library's convolutions exact and in order."""
    if not _backend.cuda_built():
        pytest.skip(f"no CUDA kernels: {_backend.why_not_native('cuda')}")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with torch.device("cuda"), set_backend("native"):
        yield


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> Iterator[str]:
    convolutions, bn_relu = CHOICES[request.param]
    with set_conv1x1(convolutions), set_conv3x3(convolutions), set_bn_relu(bn_relu):
        yield request.param


@pytest.mark.parametrize("channels", [(64, 32, 32), (8, 72), (16, 12)], ids=str)  # the last are joined
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_are_convolved_as_their_join(choice: str, dtype: torch.dtype, channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    to = {"dtype": dtype, "memory_format": torch.channels_last}
    pieces = [torch.randn(4, c, 9, 7).to(**to) for c in channels]
    x, c = torch.cat(pieces, 1), sum(channels)
    mean, gamma, beta = torch.randn(3, c)
    weight, norm = torch.randn(48, c, 1, 1).to(**to), (gamma, beta, mean, torch.rand(c) + 0.5)
    calls, geometry, asked = torch.ops.ran_ext, ([1, 1], [0, 0]), paths(x)
    out = calls._joined_bn_relu_conv2d(pieces, weight, None, *norm, 1e-5, *geometry, asked)
    whole = calls._joined_bn_relu_conv2d([x], weight, None, *norm, 1e-5, *geometry, asked)
    assert torch.equal(out, whole)
    dout, rest = torch.randn_like(out), (*norm, weight, *geometry, 1e-5, True, [True, True, True], asked)
    found = calls._joined_bn_relu_conv2d_backward(dout, pieces, *rest)
    expected = calls._joined_bn_relu_conv2d_backward(dout, [x], *rest)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 37, 6, 5), (1, 64, 33, 31)])
def test_gate(shape, scale, dtype, layout):
    gate.check(shape, scale, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2, 3, 100])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 37, 6, 5), (1, 64, 33, 31)])
def test_bilinear_gate(shape, scale, dtype, layout):
    gate.check_bilinear(shape, scale, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 5, 7, 9), (2, 40, 7, 5), (8, 128, 16, 16), (1, 256, 33, 31)])
def test_conv_gate(shape, scale, dtype, layout, choice):
    conv_gate.check(shape, 24, scale, dtype, LAYOUTS[layout])
    conv_gate.check(shape, 24, scale, dtype, LAYOUTS[layout], bias=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 1, 2, 2), (3, 5, 7, 9), (2, 37, 6, 5), (1, 64, 33, 31)])
def test_pyramid(shape, option, dtype, layout):
    pool.check(shape, option, dtype, LAYOUTS[layout])
    pool.check(shape, option, dtype, LAYOUTS[layout], nan=True)
    upsample.check(shape, option, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_of_infinities_nan_and_subnormal_numbers(dtype):
    gate.test_infinities_nan_and_subnormal_numbers_as_in_pytorch(dtype)


@pytest.mark.parametrize("where", ["trunk", "mask", "dout"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bilinear_gate_of_infinities_and_nan(dtype, layout, where):
    gate.test_infinities_and_nan_around_bilinear_masks_as_in_pytorch(dtype, layout, where)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 1, 3, 5), (3, 5, 7, 9), (1, 130, 9, 7), (70, 33, 2, 2)])
def test_bn_relu(shape, training, dtype, layout, choice):
    norm.check(shape, dtype, LAYOUTS[layout], training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_relu_of_many_tiles_and_of_a_large_mean(layout, choice):
    """Of two million values a handful are so near 0 behind the normalisation that either side may round their sign."""
    for offset in (1.0, 1e2, 1e4):
        norm.check((32, 64, 32, 32), torch.float32, LAYOUTS[layout], True, offset=offset, times=4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_bn_relu_conv2d(case, training, dtype, layout, choice):
    conv.check(case, dtype, LAYOUTS[layout], training)


@pytest.mark.parametrize(
    "test",
    [
        gate.test_sliced_expanded_and_transposed_inputs,
        gate.test_bilinear_masks_of_strided_inputs,
        gate.test_gradient_that_is_not_contiguous,
        gate.test_empty,
        gate.test_gradcheck_and_second_derivatives,
        gate.test_opcheck,
        conv_gate.test_sliced_expanded_and_transposed_inputs,
        conv_gate.test_empty_batch,
        conv_gate.test_gradcheck_and_second_derivatives,
        conv_gate.test_opcheck,
        conv_gate.test_keeps_trunk_x_weights_and_the_mask_only,
        pool.test_empty_batch,
        pool.test_one_row_one_column_one_pixel,
        pool.test_sliced_expanded_and_transposed_inputs,
        pool.test_gradcheck_and_second_derivatives,
        pool.test_opcheck,
        pool.test_keeps_one_byte_a_pixel,
        upsample.test_empty_batch,
        upsample.test_sliced_expanded_and_transposed_inputs,
        upsample.test_one_pixel_below_keeps_channels_last,
        upsample.test_nan_and_infinities_as_in_pytorch,
        upsample.test_gradcheck_and_second_derivatives,
        upsample.test_opcheck,
        upsample.test_keeps_no_tensor,
        norm.test_without_affine_parameters,
        norm.test_sliced_input_and_gradient,
        norm.test_nan_reaches_output_and_gradient,
        norm.test_empty_batch,
        conv.test_gradcheck_and_second_derivatives,
        conv.test_opcheck_of_the_pieces,
        conv.test_frozen_parts_get_no_gradient,
        conv.test_keeps_x_and_not_the_activation,
        conv.test_nan_reaches_output,
        conv.test_empty_batch_in_evaluation,
    ],
    ids=lambda test: f"{test.__module__}-{test.__name__}",
)
def test_as_on_the_cpu(test: Callable[[], None]):
    test()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_module_behaves_as_batch_norm(options):
    norm.test_module_behaves_as_batch_norm(options, "native")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels", [(64, 64, 32, 1), (32, 64, 32, 2), (12, 20, 9, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_residual_unit_chains_the_statistics(dtype, layout, channels, momentum, choice):
    modules.test_residual_unit_chains_the_statistics(dtype, layout, channels, momentum)


def test_running_statistics_of_any_dtype(choice):
    """float32 ones are updated in the launch that takes the batch's, others after it."""
    x = torch.randn(4, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module = BNReLUConv2d(32, 16, 1, momentum=None)
        module.bn.running_mean, module.bn.running_var = (t.to(dtype) for t in (torch.zeros(32), torch.ones(32)))
        for scale in (1, 2, 3):
            module(x * scale)
        assert module.bn.num_batches_tracked == 3
        results.append((module.bn.running_mean.float(), module.bn.running_var.float()))
    for means, variances in results[1:]:
        torch.testing.assert_close(means, results[0][0], rtol=0.02, atol=0.01)
        torch.testing.assert_close(variances, results[0][1], rtol=0.02, atol=0.01)


def test_explain_says_what_was_asked_for(choice):
    module = AttentionModule(64, 1).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    gate = {layer.name: layer for layer in layers(module, x)}["gate"].paths["forward"]
    inside = "with" if choice == "fused" else "without"
    why = "a matrix product in channels_last" if choice == "fused" else "set_conv1x1('library') was chosen"
    assert gate == ("fused", f"{inside} the convolution before it: {why}; asked for")
    [row] = layers(nn.Sequential(BNReLUConv2d(64, 64, 1).bfloat16()), torch.randn(2, 64, 4, 4).bfloat16())
    assert "channels_last" in row.paths["forward"][1]
    x = torch.randn(2, 64, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    for kernel in (1, 3):
        [row] = layers(nn.Sequential(BNReLUConv2d(64, 64, kernel, padding=kernel // 2).bfloat16()), x)
        assert {path for path, _ in row.paths.values()} == {choice}


def test_fused_3x3_convolutions_write_no_activation_out():
    """Beside what goes in and out, no pass takes half of x: there is no copy of it, normalised or not."""
    x = torch.randn(256, 64, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 64, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.ones(64), torch.zeros(64)
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(ops.bn_relu_conv2d(x, scale, shift, None, None, weight, padding=1, training=True))

    def peak(run: Callable[[], object]) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / x.nbytes

    with set_conv3x3("fused"):
        assert peak(forward) < 1.5  # the output
    dout = torch.randn_like(outputs[0])
    assert peak(lambda: torch.autograd.grad(outputs[0], weight, dout, retain_graph=True)) < 0.9  # partial sums
    assert peak(lambda: outputs[0].backward(dout)) < 2.5  # the gradients of relu(bn(x)) and of x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(use_reentrant):
    norm.test_checkpointing_counts_a_batch_once(use_reentrant, "native")
    conv.test_checkpointing_counts_a_batch_once(use_reentrant)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training):
    conv.test_compiles_to_one_graph_forward_and_backward(training)


def test_slices_off_a_16_byte_boundary(choice):
    """The kernels' vectors are 16 bytes; the input, residual and bias here begin 2 bytes past such a boundary."""

    def shifted(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)

    case = (2, 64, 8, 8, 32, 1, 1, 0)
    values = [t.to(torch.float32 if i in (1, 2) else torch.bfloat16) for i, t in enumerate(conv.tensors(case))]
    x, g, b, w, bias, r = (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in values)
    results = []
    for place in (shifted, lambda t: t):
        out = ops.bn_relu_conv2d(place(x), g, b, None, None, place(w), place(bias), training=True, residual=place(r))
        results.append(out)
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_as_eager(x_dtype, lower, choice):
    module = conv.unit(k=1)
    x = torch.randn(2, 32, 6, 6).to(x_dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("native", "reference"):
        module.zero_grad()
        with set_backend(backend), torch.autocast("cuda", lower):
            out = module(x)
        out.float().square().sum().backward()
        results.append((out, module.conv.weight.grad, module.bn.weight.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05 * b.float().abs().max().item())


def network() -> nn.Module:
    """All ops in a small network whose convolutions are 1x1 and 3x3, in bfloat16 with float32 batch normalisation."""
    model = nn.Sequential(BNReLUConv2d(8, 32, 1), AttentionModule(32, depth=2))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    return model.to(memory_format=torch.channels_last)


def images() -> Tensor:
    return torch.randn(4, 8, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One forward and backward pass: output, gradients and buffers."""
    for p in model.parameters():
        p.grad = None
    out = model(x)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(p, q), f"tensor {i} of {len(a)}, {list(p.shape)}, differs"


def test_bit_for_bit_in_20_runs(choice):
    model, x = network(), images()
    state = copy.deepcopy(model.state_dict())
    first = [t.clone() for t in step(model, x)]
    for _ in range(20):
        model.load_state_dict(state)
        assert_same_bits(step(model, x), first)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_graph_capture_and_100_replays(momentum, choice):
    """A captured training step gives eager's bits, 100 times; the running statistics go on counting."""
    model, x = network(), images()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the libraries choose and allocate before the capture
        for _ in range(3):
            step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    state = copy.deepcopy(model.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, x)
    model.load_state_dict(state)
    twin = network()
    for mine, other in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(other, nn.BatchNorm2d):
            other.momentum = mine.momentum
    twin.load_state_dict(state)
    for _ in range(100):
        graph.replay()
        assert_same_bits(captured, step(twin, x))


def test_a_graph_and_eager_calls_at_once():
    """A replay on one stream beside eager calls on another: scratch and counters are not shared."""
    module = conv.unit(64, 64, 1).bfloat16()
    module.bn.float()
    x, y = (torch.randn(64, 64, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()

    def statistics(t: Tensor) -> list[Tensor]:
        return list(torch.ops.ran_ext.batch_norm_stats(t, [], None))

    expected_x, expected_y = statistics(x), statistics(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = statistics(x)
    torch.cuda.synchronize()
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(stream):
            beside = statistics(y)
        torch.cuda.synchronize()
        assert_same_bits(captured, expected_x)
        assert_same_bits(beside, expected_y)


def test_two_streams(choice):
    models, inputs = [network() for _ in range(2)], [images() for _ in range(2)]
    states = [copy.deepcopy(m.state_dict()) for m in models]
    expected = [[t.clone() for t in step(m, x)] for m, x in zip(models, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        for model, state in zip(models, states, strict=True):
            model.load_state_dict(state)
        torch.cuda.synchronize()
        found = []
        for model, x, stream in zip(models, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(model, x))
        torch.cuda.synchronize()
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b)


def test_does_not_wait_for_the_gpu(choice):
    model, x = network(), images()
    step(model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current(choice):
    model, x = network(), images()
    state = copy.deepcopy(model.state_dict())
    expected = [t.clone() for t in step(model, x)]
    other = network().to("cuda:1")
    other.load_state_dict(state)
    assert torch.cuda.current_device() == 0
    found = step(other, x.to("cuda:1"))
    assert all(t.device == torch.device("cuda:1") for t in found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_more_than_two_to_the_31_elements():
    trunk = torch.ones(1, 1, 2**16, 2**15 + 1, dtype=torch.bfloat16)  # 4 GiB
    out = ops.attention_gate(trunk, torch.zeros(1, 1, 2**13, 2**12 + 1, dtype=torch.bfloat16), 8)
    assert out[0, 0, -1, -1] == 1.5
    assert out[0, 0, -1].float().mean() == 1.5
    del trunk, out
    pool.test_more_than_two_to_the_31_elements()
    upsample.test_more_than_two_to_the_31_elements()


@pytest.mark.skipif(
    not hasattr(torch._C, "_remove_obj_from_tls"),
    reason="this torch does not take the choices of a block along to the thread of a GPU's backward pass",
)
def test_checkpointed_network(choice):
    model, x = network(), images()
    twin = copy.deepcopy(model)
    expected = [t.clone() for t in step(model, x)]
    found = step(nn.Sequential(Checkpointed(twin)), x)
    assert_same_bits(found, expected)


class Checkpointed(nn.Module):
    """``inner``, computed again in backward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)
