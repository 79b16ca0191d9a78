"""The folded network gives what the trained one gives, in every dtype, on both backends, and after saving."""

import copy

import pytest
import torch
from accuracy import assert_accurate
from torch import nn
from torch.nn import functional as F

from ran_ext import models, set_backend
from ran_ext.inference import FoldedConv2d, fold_for_inference
from ran_ext.nn import AttentionModule


def trained(name: str, **options) -> torch.nn.Module:
    model = models.create_model(name, width=0.25, **options)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "running_var" in key or key.endswith("bn.weight"):
                value.uniform_(0.5, 1.5)
            elif "running_mean" in key or key.endswith("bn.bias"):
                value.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("name", ["ran_base", "ran_compact", "ran_paper", "attention56", "attention92_cifar"])
def test_equals_the_trained_network(name, conv_bias, backend):
    model, x = trained(name, conv_bias=conv_bias).double(), torch.randn(3, 3, 20, 27, dtype=torch.float64)
    with set_backend(backend), torch.no_grad():
        torch.testing.assert_close(fold_for_inference(model, torch.float64)(x), model(x))
        single = fold_for_inference(model, torch.float32)(x)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_as_close_as_autocast(dtype):
    model, x = trained("ran_compact"), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", dtype):
            cast = model(x).double()
        folded = fold_for_inference(model, dtype)(x).double()
    assert (folded - exact).norm() <= 2 * (cast - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_models_where_none_is_given(dtype):
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    for model in (trained("ran_compact").to(dtype), plain.to(dtype), torch.compile(plain.to(dtype))):
        folded = fold_for_inference(model)
        convolutions = [module for module in folded.modules() if isinstance(module, FoldedConv2d)]
        assert {module.weight.dtype for module in convolutions} == {dtype}


def test_leaves_the_trained_model_alone_and_can_be_copied_and_saved(tmp_path):
    model, x = trained("ran_compact"), torch.randn(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_for_inference(model)
    with torch.no_grad():
        expected = folded(x)
        torch.testing.assert_close(copy.deepcopy(folded)(x), expected)
    torch.save(folded.state_dict(), tmp_path / "folded.pt")
    again = fold_for_inference(trained("ran_compact"))
    again.load_state_dict(torch.load(tmp_path / "folded.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again(x), expected)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in folded.parameters())


def test_new_weights_after_the_first_call_are_seen():
    folded, x = fold_for_inference(trained("ran_base")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first = folded(x)
        folded.load_state_dict(fold_for_inference(trained("ran_base")).state_dict())
        assert not torch.equal(first, folded(x))


def test_parts_fold_too_and_unfused_modules_stay():
    module, x = AttentionModule(16, 2).eval(), torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fold_for_inference(module)(x), module(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="dtype must be a floating-point type"):
        fold_for_inference(module, torch.int8)


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="the kernel needs AVX2")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(2, 32, 9, 7), (17, 64, 2, 1), (3, 64, 16, 16)])
def test_3x3_in_float32_takes_the_kernel(shape, relu):
    conv, x = nn.Conv2d(shape[1], 96, 3, padding=1), torch.randn(shape).to(memory_format=torch.channels_last)
    folded = FoldedConv2d(conv, conv.weight.double(), conv.bias.double(), relu, torch.float32)
    with torch.no_grad():
        out = folded(x)
        eager, exact = (
            F.conv2d(x.to(d), conv.weight.to(d), conv.bias.to(d), padding=1) for d in (x.dtype, torch.double)
        )
    [panels] = [kept._made[-1] for kept in folded._panels.values() if kept._made is not None]
    assert folded._packed._made is None
    assert_accurate("out", out, *((F.relu(t) if relu else t) for t in (eager, exact)))
    with pytest.raises(ValueError, match="conv3x3: panels must be"):
        torch.ops.ran_ext.conv3x3_packed(x, panels[1:], folded.bias, None, relu)
    with pytest.raises(ValueError, match=r"conv3x3: panels must be .*got .*\[16\]"):
        torch.ops.ran_ext.conv3x3_packed(x, panels, folded.bias[:16], None, relu)
    with pytest.raises(ValueError, match="conv3x3: there is no kernel"):
        torch.ops.ran_ext.conv3x3_pack(conv.weight[..., :2], x, 2)
