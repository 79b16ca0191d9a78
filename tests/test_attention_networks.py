"""Attention-56 and its like: the paper's figures, and values and gradients of the same layers in plain PyTorch."""

import pytest
import torch
from accuracy import LAYOUTS, error
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ran_ext import explain, fold_for_inference, models, set_backend
from ran_ext._attention_maps import attention_maps, depths
from ran_ext._explain import layers
from ran_ext.models import attention56, attention92_cifar, create_model
from ran_ext.nn import AttentionGate, AttentionModule, ResidualUnit, SoftMaskBranch

SMALL = {"attention92_cifar": {"width": 0.25}, "attention56": {"width": 0.125, "num_classes": 7}}


def figures(model, size):
    """Parameters, and multiply-adds of one image, counted on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


def made(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "parameters", "multiply_adds", "paper"),
    [
        ("attention56", {}, 31_389_864, 6.148e9, (31.9e6, 6.2e9)),
        ("attention92", {}, 51_765_416, 10.356e9, (51.3e6, 10.4e9)),
        ("attention56", {"unit": "resnext", "skip": True}, 31_314_856, 6.419e9, (31.9e6, 6.3e9)),
    ],
)
def test_parameters_and_multiply_adds_are_the_papers_within_2_percent(name, options, parameters, multiply_adds, paper):
    found = figures(made(name, **options), 224)
    assert found[0] == parameters
    assert found[1] == pytest.approx(multiply_adds, rel=1e-3)
    assert found == pytest.approx(paper, rel=0.02)


def test_with_units_across_the_masks_parameters_are_those_of_the_authors_caffe_networks():
    """Their definitions, layer by layer: 31,810,728 and 52,466,344 with each batch normalisation's scale and shift."""
    counts = [sum(p.numel() for p in made(name, skip=True).parameters()) for name in ("attention56", "attention92")]
    assert counts == [31_810_728, 52_466_344]


@pytest.mark.parametrize(
    ("name", "modules", "parameters", "paper"),
    [
        ("attention92_cifar", 2, 1_787_482, 1.9e6),
        ("attention236_cifar", 6, 4_923_482, 5.1e6),
        ("attention452_cifar", 12, 9_627_482, 8.6e6),
    ],
)
def test_cifar_parameters(name, modules, parameters, paper):
    model = made(name)
    found = sum(p.numel() for p in model.parameters())
    assert found == parameters
    assert found == pytest.approx(paper, rel=0.12)
    assert depth_of_trunk(model) == 36 * modules + 20 == int(name.removeprefix("attention").removesuffix("_cifar"))


@pytest.mark.parametrize("depth", [56, 92, 128, 164])
def test_the_name_says_the_depth(depth):
    assert depth_of_trunk(made(f"attention{depth}")) == depth


def depth_of_trunk(model):
    """Convolutions and dense layers from image to logits, those in masks and shortcuts left out."""
    outside = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(".mask." not in name and "shortcut" not in name for name in outside)


def plain_unit(unit, x):
    h = x
    for part in (unit.conv1, unit.conv2, unit.conv3):
        h = part.conv(F.relu(part.bn(h)))
    return h + (x if unit.shortcut is None else unit.shortcut(x))


def plain_inception(unit, x):
    def run(parts, h):
        for part in parts:
            h = part.conv(F.relu(part.bn(h)))
        return h

    branches = [run([unit.branch1], x), run(unit.branch2, x), run(unit.branch3, x)]
    return run([unit.join], torch.cat(branches, 1)) + (x if unit.shortcut is None else unit.shortcut(x))


def plain_units(units, x):
    for unit in units:
        x = (plain_unit if isinstance(unit, ResidualUnit) else plain_inception)(unit, x)
    return x


def plain_up(x, size, mode):
    if mode == "bilinear":
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return F.interpolate(x, scale_factor=2, mode="nearest")[..., : size[0], : size[1]]


def plain_mask(mask, x, skip, mode):
    levels = [x]
    for units in mask.down:
        levels.append(plain_units(units, F.max_pool2d(levels[-1], 2, ceil_mode=True)))
    out = levels.pop()
    for units, upper in zip(reversed(mask.up), reversed(levels), strict=True):
        out = plain_up(plain_units(units, out), upper.shape[2:], mode)
        if upper is not x and skip == "identity":
            out = out + upper
        elif upper is not x and skip:
            out = out + plain_units([mask.skip[len(levels) - 2]], upper)
        levels.pop() if upper is not x else None
    for part in (mask.conv1, mask.conv2):
        out = part.conv(F.relu(part.bn(out)))
    return out


def plain_weights(logits, attention):
    if attention == "channel":
        return logits / logits.norm(dim=1, keepdim=True)
    if attention == "spatial":
        var, mean = torch.var_mean(logits, (2, 3), correction=0, keepdim=True)
        logits = (logits - mean) / (var + 1e-5).sqrt()
    return torch.sigmoid(logits)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("attention", ["mixed", "channel", "spatial"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_gate_is_sections_3_1_and_3_2(mode, attention, residual):
    trunk = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    gate = AttentionGate(2, mode, attention, residual)
    weights = plain_weights(plain_up(mask, (7, 6), mode), attention)
    expected = (1 + weights if residual else weights) * trunk
    torch.testing.assert_close(gate(trunk, mask), expected)
    dout = torch.randn_like(trunk)
    ours, plain = (torch.autograd.grad(out, (trunk, mask), dout) for out in (gate(trunk, mask), expected))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gate.weights(trunk, mask), weights)


def test_a_constant_mask_has_no_nan():
    trunk, mask = torch.ones(1, 4, 3, 3), torch.zeros(1, 4, 3, 3, requires_grad=True)
    for attention, expected in (("channel", 1.0), ("spatial", 1.5)):
        out = AttentionGate(attention=attention)(trunk, mask)
        out.sum().backward()
        assert out.unique().tolist() == [expected]
        assert mask.grad.isfinite().all()


def plain_module(module, x, skip, mode, attention, residual):
    x = plain_units(module.pre, x)
    trunk, weights = plain_units(module.trunk, x), plain_weights(plain_mask(module.mask, x, skip, mode), attention)
    return plain_units(module.post, (1 + weights) * trunk if residual else weights * trunk)


def plain_network(model, x, skip="identity", interpolation="bilinear", attention="mixed", residual=True):
    x = model.conv1(x)
    if model.bn1 is not None:
        x = F.max_pool2d(F.relu(model.bn1(x)), 3, 2, 1)
    for stage in model.stages:
        for part in stage:
            if isinstance(part, AttentionModule):
                x = plain_module(part, x, skip, interpolation, attention, residual)
            else:
                x = plain_units([part], x)
    return model.fc(F.relu(model.bn2(x)).mean((2, 3)))


FORMS = {
    "default": {},
    "nearest": {"interpolation": "nearest"},
    "units across the masks": {"skip": True},
    "nothing across the masks": {"skip": False},
    "channel": {"attention": "channel"},
    "spatial": {"attention": "spatial", "interpolation": "nearest"},
    "naive": {"residual": False},
    "resnext": {"unit": "resnext"},
    "inception": {"unit": "inception"},
    "biases": {"conv_bias": True},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("name", "form", "size"),
    [*(("attention56", form, (70, 37)) for form in FORMS), ("attention92_cifar", "default", (9, 14))],
)
def test_values_and_gradients_are_those_of_plain_pytorch(name, form, size, backend):
    options = FORMS[form]
    torch.manual_seed(1)
    model = create_model(name, **SMALL[name], **options).double()
    twin = create_model(name, **SMALL[name], **options).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    options = {k: v for k, v in options.items() if k in ("skip", "interpolation", "attention", "residual")}
    with set_backend(backend):
        ours = model(x)
        ours.square().sum().backward()
    plain = plain_network(twin, x, **options)
    plain.square().sum().backward()
    assert error(ours, plain) < 1e-10
    for (key, own), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
    for (key, own), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, expected, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "least"), [("attention92_cifar", 5), ("attention56", 17)])
def test_any_image_size_from_the_smallest(name, least):
    model = create_model(name, **SMALL[name])
    for size in ((least, least), (least, 2 * least + 1), (40, least + 6)):
        out = model(torch.randn(2, 3, *size))
        out.sum().backward()
        assert out.shape == (2, model.fc.out_features)
    with pytest.raises(ValueError, match=rf"AttentionNetwork: images must be .* at least {least}, got"):
        model(torch.randn(2, 3, least - 1, 40))


def test_masks_pool_deeper_where_the_resolution_is_larger():
    assert list(depths(attention56(width=0.125)).values()) == [3, 2, 1]
    assert set(depths(attention92_cifar(width=0.125)).values()) == {3, 2, 1}


@pytest.mark.parametrize(("form", "layout"), [("default", "channels_last"), *((form, "contiguous") for form in FORMS)])
def test_folds_for_inference(form, layout):
    model, x = attention56(width=0.125, **FORMS[form]), torch.randn(2, 3, 33, 40).to(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        model(x)  # running statistics of its own
        expected = model.eval().double()(x.double())
        torch.testing.assert_close(fold_for_inference(model, torch.float64)(x), expected)


@pytest.mark.parametrize("options", [{}, {"attention": "channel"}, {"attention": "spatial", "residual": False}])
def test_maps_and_explanation_know_the_form(options, capsys):
    model, x = attention56(width=0.125, **options), torch.randn(2, 3, 33, 33)
    maps = attention_maps(model, x)
    assert len(maps) == 3
    for found in maps.values():
        assert found.mask.shape == (2, 33, 33)
    if options.get("attention") == "channel":  # L2-normalised: not a sigmoid's (0, 1)
        assert min(found.mask.min() for found in maps.values()) < 0
    explain(model, x)
    told = capsys.readouterr().out
    assert ("channel attention: runs as written" in told) == (options.get("attention") == "channel")
    assert any(layer.op == "attention_gate" for layer in layers(model, x))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_1x1_convolutions_commute_with_bilinear_upsampling(size):
    """So that the mask's two may run at half the resolution, before the gate."""
    mask = SoftMaskBranch(8, 1, interpolation="bilinear").double().eval()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    low = mask.features(x)
    late = mask.conv2(F.interpolate(low, size=size, mode="bilinear"))
    torch.testing.assert_close(F.interpolate(mask.conv2(low), size=size, mode="bilinear"), late)
    trunk = torch.randn_like(x)
    gate = AttentionGate(2, interpolation="bilinear")
    torch.testing.assert_close(gate(trunk, mask(x)), (1 + torch.sigmoid(late)) * trunk)


def test_a_trunk_of_ones_own():
    own = nn.Conv2d(8, 8, 5, padding=2)
    module, x = AttentionModule(8, 1, trunk=own).eval(), torch.randn(2, 8, 7, 9)
    h = module.pre(x)
    weights = torch.sigmoid(F.interpolate(module.mask(h), scale_factor=2)[..., :7, :9])
    torch.testing.assert_close(module(x), module.post((1 + weights) * own(h)))
    assert module.trunk is own
    with pytest.raises(ValueError, match=r"trunk must keep the shape, got \[2, 8, 5, 7\] from .*; it is a Conv2d"):
        AttentionModule(8, 1, trunk=nn.Conv2d(8, 8, 3))(x)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: attention56(unit="dense"),
            ValueError,
            "unit must be one of 'bottleneck', 'resnext', 'inception'",
        ),
        (lambda: attention56(width=0), ValueError, "AttentionNetwork: width"),
        (lambda: attention56(residual="no"), TypeError, "AttentionNetwork: residual must be true or false, got 'no'"),
        (
            lambda: attention56(width=0.1, attention=False),
            ValueError,
            "AttentionGate: attention must be one of",
        ),
        (lambda: attention56(width=0.1, skip="unit"), ValueError, "skip must be False, True or 'identity', got 'unit'"),
        (
            lambda: attention56(width=0.1, interpolation="cubic"),
            ValueError,
            "interpolation must be one of 'nearest',",
        ),
        (lambda: AttentionModule(8, 1, trunk=3), TypeError, r"trunk must be an nn.Module, got 3 \(int\)"),
        (lambda: AttentionGate(residual=2), TypeError, "AttentionGate: residual must be True or False, got 2"),
        (lambda: models.attention56(depth=2), TypeError, "depth"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
