"""Attention in other backbones and along time: values of plain PyTorch, and training as without attention."""

import doctest
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import attention_gain
from ran_ext import convert, explain, fold_for_inference, set_backend
from ran_ext.models import AttentionLSTM, TimeMask, create_model, list_models
from ran_ext.nn import AttentionModule

BACKBONES = ["vgg16_attention", "alexnet_attention", "mobilenet_v2_attention"]
DEPTHS = {"vgg16_attention": [2, 1], "alexnet_attention": [1], "mobilenet_v2_attention": [2, 1]}


def plain_unit(unit, x):
    h = x
    for part in (unit.conv1, unit.conv2, unit.conv3):
        h = part.conv(F.relu(part.bn(h)))
    return h + x


def plain_module(module, x):
    levels, trunk = [x], module.trunk(x)
    for [unit] in module.mask.down:
        levels.append(plain_unit(unit, F.max_pool2d(levels[-1], 2, ceil_mode=True)))
    m = levels.pop()
    for [unit] in reversed(module.mask.up):
        m = plain_unit(unit, m)
        if len(levels) > 1:
            upper = levels.pop()
            m = F.interpolate(m, scale_factor=2)[..., : upper.shape[2], : upper.shape[3]]
    m = module.mask.conv2(module.mask.conv1(m))
    m = F.interpolate(m, scale_factor=2)[..., : x.shape[2], : x.shape[3]]
    return (1 + torch.sigmoid(m)) * trunk


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_are_plain_pytorch_with_gates(name, backend):
    model, x = create_model(name, width=0.25).double().eval(), torch.randn(2, 3, 37, 50, dtype=torch.float64)
    expected = x
    for layer in model.features:
        expected = plain_module(layer, expected) if isinstance(layer, AttentionModule) else layer(expected)
    with set_backend(backend):
        torch.testing.assert_close(model(x), model.fc(expected.mean((2, 3))))
    assert [module.depth for module in model.modules() if isinstance(module, AttentionModule)] == DEPTHS[name]


@pytest.mark.parametrize("name", BACKBONES)
def test_without_attention_the_masks_alone_are_left_out(name):
    torch.manual_seed(0)
    with_masks, plain = (create_model(name, width=0.25, attention=attention) for attention in (True, False))
    own = sum(p.numel() for key, p in with_masks.named_parameters() if ".mask." in key)
    counts = [sum(p.numel() for p in model.parameters()) for model in (with_masks, plain)]
    assert counts[0] - own == counts[1]
    assert not any(isinstance(module, AttentionModule) for module in plain.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_train_convert_and_take_any_size(name, capsys):
    assert name in list_models()
    model = create_model(name, num_classes=7, in_channels=1, width=0.25, dropout=0.0)
    for size in ((32, 32), (33, 41)):
        out = model(torch.randn(2, 1, *size))
        out.sum().backward()
        assert out.shape == (2, 7)
    assert all(p.grad is not None for p in model.parameters())
    x = torch.randn(2, 1, 32, 32)
    expected = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(fold_for_inference(model)(x), expected, rtol=1e-3, atol=1e-4)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(convert(model)(x), expected, rtol=1e-3, atol=1e-4)
    explain(model, x)
    assert "attention_gate" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"BackboneNetwork: images must be \(N, 1, H, W\) with H and W at least 32"):
        model(torch.randn(2, 1, 31, 32))


@pytest.mark.parametrize("name", BACKBONES)
def test_errors_of_options(name):
    with pytest.raises(ValueError, match=f"{name}: width"):
        create_model(name, width=-1)
    with pytest.raises(TypeError, match=f"{name}: attention must be true or false, got 'channel'"):
        create_model(name, attention="channel")


@pytest.mark.parametrize(("depth", "steps"), [(1, 2), (2, 9), (3, 12), (3, 5)])
def test_lstm_is_plain_pytorch_with_a_gate_along_time(depth, steps):
    model = AttentionLSTM(6, 4, hidden=8, layers=2, depth=depth).double()
    x = torch.randn(3, steps, 6, dtype=torch.float64)
    trunk = model.lstm(x)[0].transpose(1, 2)
    levels = [trunk]
    for conv in model.mask.down:
        levels.append(F.relu(conv(F.max_pool1d(levels[-1], 2, ceil_mode=True))))
    m = levels.pop()
    for conv in list(model.mask.up)[:0:-1]:
        upper = levels.pop()
        m = F.interpolate(F.relu(conv(m)), scale_factor=2)[..., : upper.shape[2]] + upper
    m = model.mask.last(F.relu(model.mask.up[0](m)))
    m = F.interpolate(m, scale_factor=2)[..., :steps]
    expected = model.fc(((1 + torch.sigmoid(m)) * trunk).mean(2))
    torch.testing.assert_close(model(x), expected)
    parameters = [*model.parameters()]
    ours, plain = (torch.autograd.grad(out.square().sum(), parameters) for out in (model(x), expected))
    torch.testing.assert_close(ours, plain)
    assert TimeMask(8, depth)(torch.randn(1, 8, steps)).shape == (1, 8, -(-steps // 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: AttentionLSTM(6, 4, depth=0), "depth must be at least 1"),
        (lambda: AttentionLSTM(6, 4, dropout=1.0), r"dropout in \[0, 1\), got"),
        (lambda: AttentionLSTM(6, 4, depth=3)(torch.zeros(2, 4, 6)), r"must be \(N, T, 6\) with T at least 5, got"),
        (lambda: AttentionLSTM(6, 4)(torch.zeros(2, 9, 5)), r"must be \(N, T, 6\) .* got \[2, 9, 5\]"),
        (lambda: AttentionLSTM(6, 4)(torch.zeros(9, 6)), r"got \[9, 6\]"),
    ],
)
def test_lstm_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_lstm_without_attention_is_an_lstm():
    model = AttentionLSTM(6, 4, hidden=8, attention=False)
    assert [type(module) for module in model.children()] == [nn.LSTM, nn.Dropout, nn.Linear]
    assert model(torch.randn(2, 1, 6)).shape == (2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", attention_gain.CASES)
def test_the_loss_falls_on_real_data_as_without_attention(case):
    steps = 60 if "LSTM" in case else 25
    found = [attention_gain.measure(case, attention, seed=0, steps=steps) for attention in (True, False)]
    for row in found:
        assert row["loss_last"] < row["loss_first"]
    assert found[0]["loss_last"] < found[1]["loss_last"] + 0.1


def test_the_table_in_the_docs_is_that_of_the_file():
    root = Path(__file__).resolve().parent.parent
    table = attention_gain.table(json.loads(attention_gain.RESULTS.read_text())["rows"])
    assert table in (root / "docs" / "networks.md").read_text()


def test_examples_of_the_command():
    assert doctest.testmod(attention_gain).failed == 0


def test_the_command_measures_what_is_missing(tmp_path, capsys, monkeypatch):
    flags = ["--case", "LSTM, rows", "--seeds", "1", "--steps", "2", "--out", str(tmp_path / "gain.json")]
    assert attention_gain.main(flags) == 0
    told = capsys.readouterr().out
    assert "| LSTM, rows |" in told
    monkeypatch.setattr(attention_gain, "measure", None)
    assert attention_gain.main(flags) == 0  # none again
    assert capsys.readouterr().out == told
