"""Pre-activation convolution against plain PyTorch: every path (matrix product, ATen), dtype, layout and use."""

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, MEANS, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ran_ext import ops, set_backend
from ran_ext.nn import BNReLUConv2d

pytestmark = pytest.mark.usefixtures("native")

# n, c_in, h, w, c_out, kernel, stride, padding: channels in multiples of 32 take the matrix products, the others ATen
CASES = [
    (4, 64, 9, 7, 32, 1, 1, 0),
    (5, 96, 16, 16, 160, 1, 1, 0),
    (3, 32, 8, 8, 64, 3, 2, 1),
    (2, 64, 5, 6, 32, 3, 1, 1),
    (9, 64, 16, 15, 96, 3, 1, 1),
    (12, 32, 1, 3, 64, 3, 1, 1),
    (2, 288, 3, 4, 256, 3, 1, 1),
    (40, 32, 1, 1, 32, 3, 1, 1),
    (2, 32, 7, 7, 32, 5, 3, 2),
    (2, 7, 5, 5, 9, 3, 1, 1),
    (2, 1, 4, 4, 1, 1, 1, 0),
    (1, 32, 3, 3, 64, 1, 2, 0),
]


def tensors(case, residual: bool = True, offset: float = 0.5) -> list[Tensor]:
    n, ci, h, w, co, k, s, p = case
    size = [(v + 2 * p - k) // s + 1 for v in (h, w)]
    return [
        torch.randn(n, ci, h, w, dtype=torch.float64) * 2 + offset,
        torch.rand(ci, dtype=torch.float64) + 0.5,
        torch.randn(ci, dtype=torch.float64) + 1,  # large positive beta: padding must be zero after the ReLU
        torch.randn(co, ci, k, k, dtype=torch.float64) / (ci * k * k) ** 0.5,
        torch.randn(co, dtype=torch.float64),
        *([torch.randn(n, co, *size, dtype=torch.float64)] if residual else []),
    ]


def run(fn, inputs, dout, case, training=True, layout=torch.contiguous_format) -> list[Tensor]:
    *_, s, p = case
    x, gamma, beta, weight, bias, *residual = (
        (t.contiguous(memory_format=layout) if t.dim() == 4 else t).detach().requires_grad_() for t in inputs
    )
    ci = x.shape[1]
    mean, var = torch.linspace(-1, 1, ci, dtype=gamma.dtype), torch.linspace(0.5, 2, ci, dtype=gamma.dtype)
    out = fn(
        x,
        gamma,
        beta,
        mean,
        var,
        weight,
        bias,
        stride=s,
        padding=p,
        training=training,
        residual=(residual or [None])[0],
    )
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(t.grad for t in (x, gamma, beta, weight, bias, *residual)), mean, var]


NAMES = ("out", "dx", "dgamma", "dbeta", "dweight", "dbias", "dresidual", "running_mean", "running_var")


def check(case, dtype, layout, training=True, times=2.0, offset=0.5) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base = [t.to(wide if t.dim() == 1 and i < 3 else dtype) for i, t in enumerate(tensors(case, offset=offset))]
    dout = torch.randn_like(base[-1])
    exact = run(ops.bn_relu_conv2d_ref, [t.double() for t in base], dout, case, training)
    eager = run(ops.bn_relu_conv2d_ref, base, dout, case, training, layout)
    ours = run(ops.bn_relu_conv2d, base, dout, case, training, layout)
    for name, a, b, e in zip(NAMES, ours, eager, exact, strict=True):
        assert_accurate(name, a, b, e, times, mean=offset / 2)
    assert ours[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_statistics(case, training, dtype, layout):
    check(case, dtype, LAYOUTS[layout], training)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 4),
    ci=st.sampled_from([3, 8, 32, 64]),
    co=st.sampled_from([5, 32, 64]),
    h=st.integers(3, 11),
    w=st.integers(3, 11),
    kernel=st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 2, 0)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(list(LAYOUTS.values())),
    mean=st.sampled_from(MEANS),
)
def test_any_shape(n, ci, co, h, w, kernel, dtype, layout, mean):
    check((n, ci, h, w, co, *kernel), dtype, layout, times=4, offset=2 * mean)


def test_gradcheck_and_second_derivatives():
    for case in ((2, 3, 4, 4, 2, 1, 1, 0), (2, 2, 4, 3, 2, 3, 2, 1)):
        inputs = tuple(t.requires_grad_() for t in tensors(case))
        for training in (True, False):

            def call(x, g, b, w, bias, r, case=case, training=training):
                mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
                return ops.bn_relu_conv2d(
                    x, g, b, mean, var, w, bias, stride=case[6], padding=case[7], training=training, residual=r
                )

            assert torch.autograd.gradcheck(call, inputs)
            assert torch.autograd.gradgradcheck(call, inputs)


def test_function_transforms():
    x, g, b, w, bias = (t.float() for t in tensors((2, 4, 5, 5, 3, 3, 1, 1), residual=False))

    def loss(w, fn):
        return fn(x, g, b, None, None, w, bias, padding=1, training=True).square().sum()

    torch.testing.assert_close(
        torch.func.grad(loss)(w, ops.bn_relu_conv2d), torch.func.grad(loss)(w, ops.bn_relu_conv2d_ref)
    )


@pytest.mark.parametrize(
    ("case", "layout"), [(CASES[0], "contiguous"), *((case, "channels_last") for case in CASES[:5])]
)
def test_opcheck(case, layout):
    x, g, b, w, bias, r = (t.float() for t in tensors(case))
    x, w, r = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, w, r))
    stride, padding = [case[6]] * 2, [case[7]] * 2
    needs = [t.detach().requires_grad_() for t in (x, g, b, w, bias, r)]
    x_, g_, b_, w_, bias_, r_ = needs
    mean, var = torch.ops.ran_ext.batch_norm_stats(x, [], None)

    def kept(channels: int) -> list[torch.Tensor]:
        return [torch.zeros(channels), torch.ones(channels), torch.tensor(0)]

    for known, running, of_next in (
        ((None, None, False), (kept(case[1]), None), (True, kept(case[4]), None)),
        ((None, None, False), ([], None), (False, [], None)),
        ((mean, var, True), ([], None), (True, kept(case[4])[:2], 0.1)),
        ((mean, var, False), ([], None), (False, [], None)),
    ):
        torch.library.opcheck(
            torch.ops.ran_ext._chained_bn_relu_conv2d,
            (x_, g_, b_, *known, *running, 1e-5, w_, bias_, r_, stride, padding, *of_next, False),
        )
    for options in ({"bn_weight": g_, "bn_bias": b_}, {"mean": mean, "var": var, "residual": r_}):
        geometry = {"stride": stride, "padding": padding}
        torch.library.opcheck(torch.ops.ran_ext.bn_relu_conv2d, (x_, w_, bias_), {"running": [], **options, **geometry})
    dout = torch.randn_like(r)
    for wanted, fork in (([True] * 3, None), ([True, False, False], x.clone()), ([False, True, True], None)):
        torch.library.opcheck(
            torch.ops.ran_ext.bn_relu_conv2d_backward,
            (dout, x, g, b, mean, var, w, stride, padding, 1e-5, True, wanted, fork),
        )


def test_opcheck_of_the_pieces():
    x = torch.randn(2, 8, 5, 5)
    g, b = torch.rand(8), torch.randn(8)
    kept = [torch.zeros(8), torch.ones(8), torch.tensor(0)]
    mean, var = torch.ops.ran_ext.batch_norm_stats(x, [], None)
    torch.library.opcheck(torch.ops.ran_ext.batch_norm_stats, (x, kept, None))
    needs = (x.requires_grad_(), g.requires_grad_(), b.requires_grad_())
    for known, running in (((None, None, False), (kept, 0.1)), ((mean, var, True), ([], None))):
        torch.library.opcheck(torch.ops.ran_ext.bn_relu, (*needs, *known, *running, 1e-5))
    args = (torch.randn(2, 8, 5, 5), x.detach(), g.detach(), b.detach(), mean, var, 1e-5)
    torch.library.opcheck(torch.ops.ran_ext.bn_relu_backward, (*args, True))
    torch.library.opcheck(torch.ops.ran_ext.bn_relu_backward_reduce, args)
    torch.library.opcheck(torch.ops.ran_ext.bn_relu_backward_apply, (*args, mean, var, 50.0))


def unit(ci=32, co=32, k=3, layout=torch.channels_last) -> BNReLUConv2d:
    return BNReLUConv2d(ci, co, k, padding=k // 2).to(memory_format=layout)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph_forward_and_backward(training):
    module = unit().train(training)
    twin = unit().train(training)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out, expected = compiled(x, x), twin(x, x)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16])
def test_autocast_as_eager(x_dtype, residual_dtype):
    module = unit(k=1)
    x = torch.randn(2, 32, 6, 6).to(x_dtype)
    residual = None if residual_dtype is None else torch.randn(2, 32, 6, 6).to(residual_dtype)
    results = []
    for backend in ("native", "reference"):
        module.zero_grad()
        with set_backend(backend), torch.autocast("cpu", torch.bfloat16):
            out = module(x, residual)
        out.float().square().sum().backward()
        results.append((out, module.conv.weight.grad, module.bn.weight.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05 * b.float().abs().max().item())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(use_reentrant):
    module, twin = unit(), unit()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 32, 6, 6)
    checkpoint(module, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    twin(x).sum().backward()
    assert module.bn.num_batches_tracked == 1
    torch.testing.assert_close(module.bn.running_var, twin.bn.running_var)
    torch.testing.assert_close(module.conv.weight.grad, twin.conv.weight.grad)


def test_frozen_parts_get_no_gradient():
    for freeze in ("bn", "conv", "x"):
        module = unit()
        x = torch.randn(2, 32, 6, 6, requires_grad=freeze != "x")
        for name in ("bn", "conv"):
            getattr(module, name).requires_grad_(name != freeze)
        module(x).square().sum().backward()
        expected = unit()
        expected.load_state_dict(module.state_dict())
        with set_backend("reference"):
            y = x.detach().clone().requires_grad_()
            expected(y).square().sum().backward()
        assert (module.bn.weight.grad is None) == (freeze == "bn")
        assert (module.conv.weight.grad is None) == (freeze == "conv")
        for p, q in ((x, y), (module.bn.weight, expected.bn.weight), (module.conv.weight, expected.conv.weight)):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_keeps_x_and_not_the_activation():
    module = unit()
    x = torch.randn(2, 32, 16, 16, requires_grad=True)
    own = {p.data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    assert sum(kept.values()) == x.numel() + 2 * 32  # x, mean, var


def test_nan_reaches_output():
    module = unit(k=1)
    x = torch.randn(2, 32, 4, 4)
    x[1, 3, 2, 2] = float("nan")
    module.eval()
    out = module(x)
    assert out[1, :, 2, 2].isnan().all()
    assert out.isnan().sum() == 32


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_numbers_reach_what_they_touch_and_no_further_than_a_tile(special):
    """Minimal filtering (3x3, float32) may also make NaN of the rest of a 2x2 tile that a NaN or infinity reaches."""
    module = unit().eval()
    x = torch.randn(2, 32, 9, 9).to(memory_format=torch.channels_last)
    x[1, 3, 4, 4] = special
    wrong = ~module(x).isfinite()
    assert wrong[1, :, 3:6, 3:6].all()
    assert not wrong[0].any()
    wrong[1, :, 2:6, 2:6] = False
    assert not wrong.any()


def test_results_do_not_depend_on_the_number_of_threads():
    case = (9, 64, 16, 15, 96, 3, 1, 1)
    inputs = [t.float() for t in tensors(case)]
    dout, results = torch.randn_like(inputs[-1]), []
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(run(ops.bn_relu_conv2d, inputs, dout, case, True, torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize(
    "case", [(8, 64, 8, 8, 64, 1, 1, 0), (16, 16, 12, 12, 16, 1, 1, 0), (32, 32, 16, 16, 32, 5, 1, 2)]
)
def test_products_stay_within_the_rule_with_more_threads(case, threads):
    """The library splits a weight's gradient among them, and so rounds less."""
    torch.set_num_threads(threads)
    check(case, torch.float32, torch.channels_last)


def test_empty_batch_in_evaluation():
    module = unit().eval()
    assert module(torch.zeros(0, 32, 6, 6)).shape == (0, 32, 6, 6)


def test_bit_for_bit_from_run_to_run():
    case = (8, 64, 16, 16, 64, 3, 1, 1)
    inputs = [t.float() for t in tensors(case)]
    dout = torch.randn_like(inputs[-1])
    torch.set_num_threads(2)
    first = run(ops.bn_relu_conv2d, inputs, dout, case, layout=torch.channels_last)
    for _ in range(5):
        again = run(ops.bn_relu_conv2d, inputs, dout, case, layout=torch.channels_last)
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b), name


def test_counts_operations_as_plain_pytorch():
    module, x = unit(), torch.randn(2, 32, 6, 6, requires_grad=True)
    totals = []
    for backend in ("native", "reference"):
        with set_backend(backend), FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_other_convolutions_and_norms_run_unfused():
    x = torch.randn(2, 8, 6, 6)
    for change in ("groups", "dilation", "padding_mode", "norm"):
        module = BNReLUConv2d(8, 8, 3, padding=1)
        if change == "norm":
            module.bn = nn.GroupNorm(2, 8)
        else:
            option = {"groups": 2, "dilation": 2, "padding_mode": "reflect"}[change]
            module.conv = nn.Conv2d(8, 8, 3, padding=1, **{change: option})
        torch.testing.assert_close(module(x), module.conv(torch.relu(module.bn(x))), msg=change)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors(backend):
    x, w = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 3, 3)
    f = ops.bn_relu_conv2d
    none = (None,) * 4
    cases = [
        (lambda: f(x, *none, w[:, :2]), ValueError, r"weight must be \(C_out, 3, kH, kW\).*got \[5, 2, 3, 3\]"),
        (lambda: f(x, *none, w.half()), TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
        (lambda: f(x, *none, w, torch.zeros(4)), ValueError, r"bias must be \[5\].*got \[4\]"),
        (
            lambda: f(x, *none, w, stride=0),
            ValueError,
            "stride must be one whole number or a pair of them, each >= 1, got 0",
        ),
        (lambda: f(x, *none, w, padding=-1), ValueError, "padding must be"),
        (lambda: f(x, *none, torch.zeros(5, 3, 7, 7)), ValueError, "smaller than the kernel"),
        (lambda: f(x, *none, w, residual=torch.zeros(2, 5, 4, 4)), ValueError, r"residual must be \[2, 5, 2, 2\]"),
        (lambda: f(x, torch.zeros(4), *none[1:], w), ValueError, r"bn_weight must be \[3\]"),
        (lambda: f(x, *none, w.to("meta")), ValueError, "weight must be on x's device"),
    ]
    with set_backend(backend):
        for call, kind, text in cases:
            with pytest.raises(kind, match=f"bn_relu_conv2d: .*{text}"):
                call()
