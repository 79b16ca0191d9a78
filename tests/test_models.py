"""The networks: the report's parameter counts, sizes, checkpoints across backends."""

import pytest
import torch

import ran_ext
from ran_ext import models, set_backend
from ran_ext.nn import AttentionModule


@pytest.mark.parametrize(
    ("name", "with_bias", "without"),
    [
        ("ran_compact", 6_810_570, 6_796_650),
        ("ran_base", 6_808_458, 6_794_538),
        ("ran_paper", 11_460_618, 11_441_194),
    ],
)
def test_parameters_are_the_reports(name, with_bias, without):
    for conv_bias, expected in ((True, with_bias), (False, without)):
        model = models.create_model(name, conv_bias=conv_bias)
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_without_attention_the_parameters_stay_equal(width):
    with_mask, without = (models.ran_compact(width=width, attention=attention) for attention in (True, False))
    assert not any(isinstance(module, AttentionModule) for module in without.modules())
    counts = [sum(p.numel() for p in model.parameters()) for model in (with_mask, without)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)
    assert without(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_without_the_stems_pool_the_same_weights_see_twice_the_resolution():
    pooled, full = (models.ran_compact(width=0.125, stem_pool=stem_pool).eval() for stem_pool in (True, False))
    full.load_state_dict(pooled.state_dict())
    seen = []
    full.stage1.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, 3, 32, 32)
    out = full(x)
    assert seen[0].shape[2:] == (32, 32)
    assert not torch.allclose(out, pooled(x))
    torch.testing.assert_close(ran_ext.fold_for_inference(full)(x), out, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("native")
def test_a_checkpoint_gives_the_same_output_on_both_backends(tmp_path):
    model = models.ran_compact(width=0.25)
    for p in model.buffers():
        if p.is_floating_point():
            p.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = models.ran_compact(width=0.25).eval()
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(2, 3, 32, 32)
    with set_backend("native"):
        native = loaded(x)
    with set_backend("reference"):
        torch.testing.assert_close(loaded(x), native, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(6, 6), (7, 13), (32, 32), (33, 47), (224, 100)])
def test_any_image_size(size):
    model = models.ran_paper(width=0.125)
    out = model(torch.randn(2, 3, *size))
    out.sum().backward()
    assert out.shape == (2, 10)


def test_options():
    model = models.create_model("ran_base", num_classes=7, in_channels=1, dropout=0.2, conv_bias=False, width=0.25)
    assert model(torch.randn(3, 1, 16, 16)).shape == (3, 7)
    assert not any(name.endswith("conv.bias") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: models.create_model("resnet"), "no model named 'resnet'; there are alexnet_attention, .*ran_paper"),
        (lambda: models.ran_compact(width=0.125)(torch.zeros(1, 3, 5, 9)), "at least 6, got"),
        (lambda: models.ran_compact(width=0), "must be positive"),
        (lambda: AttentionModule(8, 3)(torch.zeros(2, 8, 4, 9)), "depth 3 needs an input of at least 5x5"),
        (lambda: AttentionModule(8, 0), "depth must be at least 1"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_attention_module_counts_follow_p_t_r():
    base = sum(p.numel() for p in AttentionModule(8, 2).parameters())
    unit = sum(p.numel() for p in ran_ext.nn.ResidualUnit(8, 8, 8).parameters())
    assert sum(p.numel() for p in AttentionModule(8, 2, p=2, t=3, r=2).parameters()) == base + (2 + 1 + 4) * unit
    assert sum(p.numel() for p in AttentionModule(8, 3, skip=True).parameters()) == base + (2 + 2) * unit
