"""Tracers, exporters, transforms and tensor subclasses see plain PyTorch ops, and get the values of eager calls."""

import copy
import io
import warnings
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

from ran_ext import _backend, models, ops, set_backend
from ran_ext import nn as rnn
from ran_ext.inference import fold_for_inference


class Op(nn.Module):
    """A call of an op, with parameters and statistics of its own."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        for name, shape in (("w", (8, 8, 3, 3)), ("w1", (8, 8, 1, 1)), ("b", (8,)), ("gain", (8,)), ("shift", (8,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        return self.call(self, x)


def bn(m):
    return {"running_mean": m.mean, "running_var": m.var, "training": m.training, "num_batches_tracked": m.count}


def half(x):
    return x[..., ::2, ::2]


OPS = {
    "attention_gate": lambda m, x: ops.attention_gate(x, x * 2),
    "attention_gate x2": lambda m, x: ops.attention_gate(x, half(x), 2),
    "conv_attention_gate": lambda m, x: ops.conv_attention_gate(x, half(x), m.w1, m.b, 2),
    "max_pool2d": lambda m, x: ops.max_pool2d(x),
    "max_pool2d floor": lambda m, x: ops.max_pool2d(x, ceil_mode=False),
    "upsample_add": lambda m, x: ops.upsample_add(half(x), x),
    "upsample_add size": lambda m, x: ops.upsample_add(half(x), None, x.shape[2:]),
    "upsample_add alone": lambda m, x: ops.upsample_add(x),
    "bn_relu": lambda m, x: ops.bn_relu(x, m.gain, m.shift, **bn(m)),
    "bn_relu_conv2d": lambda m, x: ops.bn_relu_conv2d(x, m.gain, m.shift, weight=m.w, padding=1, residual=x, **bn(m)),
    "bn_relu_conv2d stride": lambda m, x: ops.bn_relu_conv2d(x, None, None, weight=m.w, bias=m.b, stride=2, **bn(m)),
}
MODULES = {
    "BNReLU": lambda: rnn.BNReLU(8),
    "BNReLUConv2d": lambda: rnn.BNReLUConv2d(8, 6, 3, padding=1),
    "ResidualUnit": lambda: rnn.ResidualUnit(8, 16, 4, stride=2),
    "AttentionModule": lambda: rnn.AttentionModule(8, 2, skip=True),
}
#: Of the paper's the shortest; the others have more of the same modules.
NAMES = ("ran_base", "ran_compact", "ran_paper", "attention56")
NETWORKS = {name: lambda name=name: models.create_model(name, width=0.125) for name in NAMES}
FOLDED = {
    "folded unit": lambda: fold_for_inference(trained(rnn.ResidualUnit(8, 16, 4, stride=2))),
    "folded module": lambda: fold_for_inference(trained(rnn.AttentionModule(8, 2))),
    "folded chain": lambda: fold_for_inference(trained(chain())),
}
SMALL = {**{name: lambda call=call: Op(call) for name, call in OPS.items()}, **MODULES, **FOLDED}


def chain():
    return nn.Sequential(nn.Conv2d(8, 8, 3), rnn.BNReLUConv2d(8, 8, 1), rnn.BNReLU(8), nn.Flatten(2))


def trained(module):
    """With running statistics and scales of their own."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if "var" in key or key.endswith("bn.weight"):
                value.uniform_(0.5, 1.5)
            elif "mean" in key or key.endswith("bn.bias"):
                value.normal_(0, 0.2)
    return module


def made(name):
    module = {**SMALL, **NETWORKS}[name]()
    return trained(module).eval(), torch.randn(2, 3, 20, 22) if name in NETWORKS else torch.randn(2, 8, 9, 7)


def targets(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.fixture(autouse=True)
def chosen():
    with set_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about jit and what it would do another way
        yield


STRICT = ("attention_gate x2", "bn_relu_conv2d", "ResidualUnit", "folded chain", "AttentionModule")


@pytest.mark.parametrize(
    ("name", "strict", "training"),
    [(name, False, False) for name in SMALL]
    + [(name, False, True) for name in (*MODULES, "bn_relu", "bn_relu_conv2d")]
    + [(name, True, training) for name in STRICT for training in (False, True)][:-1],
)
def test_export_gives_aten_ops_and_the_eager_values(name, strict, training):
    module, x = made(name)
    twin = copy.deepcopy(module).train(training)
    exported = torch.export.export(module.train(training), (x,), strict=strict)
    assert not [target for target in targets(exported.graph) if "ran_ext" in target or "mkldnn" in target]
    program = exported.module()
    assert_close(program(x), twin(x))
    buffers = dict(twin.named_buffers())
    for key, value in program.named_buffers():  # those that the graph uses
        assert_close(value, buffers[key])


@pytest.mark.parametrize(("name", "folds"), [("ran_compact", True), ("AttentionModule", False)])
def test_networks_export_for_every_batch_and_size(name, folds, tmp_path):
    module, example = made(name)
    module = fold_for_inference(module) if folds else module
    sizes = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(module, (example,), dynamic_shapes=(sizes,))
    torch.export.save(exported, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((17, 32), (32, 23)):
        x = torch.randn(5, example.shape[1], *size)
        assert_close(program(x), module(x), rtol=1e-4, atol=1e-5)


def onnx_values(module, x, path, **options):
    """What onnxruntime makes of the file, for the traced x and, where the batch is dynamic, for more of it."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with redirect_stdout(io.StringIO()):
        torch.onnx.export(module, (x,), path, opset_version=18, **options)
    session = runtime.InferenceSession(path)
    more = "dynamic_shapes" in options or "dynamic_axes" in options
    for one in (x, torch.cat([x, x + 1, x * 2])) if more else (x,):
        found = session.run(None, {session.get_inputs()[0].name: one.numpy()})[0]
        np.testing.assert_allclose(found, module(one).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
def test_the_old_onnx_exporter(name, tmp_path):
    module, x = made(name)
    axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    onnx_values(module, x, tmp_path / "model.onnx", dynamo=False, **axes)


@pytest.mark.parametrize("name", ["attention_gate x2", "conv_attention_gate", "upsample_add size", "folded chain"])
def test_onnx(name, tmp_path):
    module, x = made(name)
    onnx_values(module, x, tmp_path / "model.onnx", dynamo=True)


@pytest.mark.parametrize(("name", "folds"), [("ran_compact", True), ("AttentionModule", False)])
def test_onnx_for_every_batch(name, folds, tmp_path):
    module, x = made(name)
    module = fold_for_inference(module) if folds else module
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    onnx_values(module, x, tmp_path / "model.onnx", dynamo=True, dynamic_shapes=shapes)


@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
def test_fx_traces_to_plain_ops(name):
    module, x = made(name)
    graph = torch.fx.symbolic_trace(module, {"residual": None} if name == "BNReLUConv2d" else None)
    assert not [target for target in targets(graph.graph) if "ran_ext" in target]
    assert_close(graph(x), module(x))
    assert_close(graph(x[:1, ..., :-1, :-2]), module(x[:1, ..., :-1, :-2]))


def test_fx_traces_a_residual():
    module, x = made("BNReLUConv2d")
    residual = torch.randn_like(module(x))
    graph = torch.fx.symbolic_trace(module)
    assert_close(graph(x, residual), module(x, residual))
    assert_close(graph(x), module(x))  # the same graph, left without one


def test_fx_keeps_the_modules_so_that_the_mode_can_change():
    module, x = made("ResidualUnit")
    twin = copy.deepcopy(module).train()
    graph = torch.fx.symbolic_trace(module).train()
    assert_close(graph(x), twin(x))
    assert_close(graph.conv2.bn.running_mean, twin.conv2.bn.running_mean)
    assert_close(graph.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
def test_jit_traces_to_plain_ops(name):
    module, x = made(name)
    traced = torch.jit.trace(module, x)
    assert "ran_ext::" not in str(traced.inlined_graph)
    assert "mkldnn::" not in str(traced.inlined_graph)
    assert_close(traced(x), module(x))
    assert_close(traced(x[:1, ..., :-1, :-2]), module(x[:1, ..., :-1, :-2]))


@pytest.mark.parametrize("name", [*MODULES, *NETWORKS, *FOLDED])
def test_jit_script_says_what_to_use(name):
    with pytest.raises(TypeError, match=r"torch.jit.script does not take ran_ext.*: use torch.jit.trace\(.* or torch."):
        torch.jit.script(nn.Sequential(made(name)[0]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
def test_meta_tensors_get_shapes(name, training):
    module, x = made(name)
    module.train(training)
    expected = module(x)
    found = module.to("meta")(x.to("meta"))
    assert (found.device.type, found.shape, found.dtype) == ("meta", expected.shape, expected.dtype)


@pytest.mark.parametrize("name", SMALL)
def test_make_fx_and_fake_tensors_see_plain_ops(name):
    module, x = made(name)
    graph = make_fx(module)(x)
    assert not [target for target in targets(graph.graph) if "ran_ext" in target or "mkldnn" in target]
    assert_close(graph(x), module(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = module(mode.from_tensor(x))
    assert fake.shape == module(x).shape


@pytest.mark.parametrize("length", [1, 2, 3, 17, 100, 1023, 1024, 1025])
def test_a_graph_for_every_size_takes_the_pixels_that_the_ops_take(length):
    """One exported program resizes to the size where the ops up-sample by two and crop."""
    lower = torch.arange(-(-length // 2), dtype=torch.float32).view(1, 1, 1, -1)
    skip = torch.zeros(1, 1, 2, length)
    trunk = torch.ones(1, 1, 2, length)
    for op, wide in ((ops.upsample_add, skip), (lambda mask, trunk: ops.attention_gate(trunk, mask, 2), trunk)):
        assert torch.equal(torch.jit.trace(op, (lower, wide))(lower, wide), op(lower, wide))


@pytest.mark.parametrize("name", SMALL)
def test_a_subclass_sees_every_op(name):
    module, x = made(name)
    both = module(TwoTensor(x, x + 1))
    assert_close(both.a, module(x))
    assert_close(both.b, module(x + 1))


COMPILED = ("attention_gate x2", "conv_attention_gate", "max_pool2d", "upsample_add", "bn_relu_conv2d", "ResidualUnit")


@pytest.mark.parametrize(
    ("name", "compiles"), [(name, False) for name in (*OPS, *MODULES)] + [(name, True) for name in COMPILED]
)
def test_function_transforms_see_plain_ops(name, compiles):
    module, x = made(name)
    torch._dynamo.reset()  # its limit of compilations counts those of the cases before
    call = torch.func.vmap(torch.func.grad(lambda one: module(one[None]).square().sum()))
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(x) if compiles else call(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sharded_tensors_run_as_plain_pytorch():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("BNReLUConv2d", "ResidualUnit"):
            module, x = made(name)
            expected = module(x)
            found = distribute_module(module, mesh)(distribute_tensor(x, mesh, [Replicate()]))
            assert isinstance(found, DTensor)
            assert_close(found.full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_ahead_of_time_inductor(tmp_path):
    module, x = made("BNReLUConv2d")
    exported = torch.export.export(module, (x,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    assert_close(torch._inductor.aoti_load_package(package)(x), module(x))


@pytest.mark.usefixtures("native")
def test_compile_keeps_the_fused_ops():
    module, x = made("BNReLUConv2d")
    seen = []

    def backend(graph, _):
        seen.extend(targets(graph.graph))
        return graph

    assert_close(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))
    assert "ran_ext.bn_relu_conv2d" in seen


@pytest.mark.usefixtures("native")
def test_the_rule():
    x, meta = torch.ones(1, 1, 2, 2), torch.ones(1, device="meta")
    assert _backend.use_native(x, None, nn.Parameter(x))
    with set_backend("native"):
        assert not _backend.use_native(TwoTensor(x, x))
        assert not _backend.use_native(x, None, TwoTensor(x, x))
    assert not _backend.use_native(meta)
    assert _backend.use_native(x)
