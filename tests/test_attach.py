"""Attention behind layers of anybody's network: nothing changes before training, and everything can be trained."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ran_ext import AttachedAttention, attach_attention, convert, explain, fold_for_inference
from ran_ext.models import ran_compact
from ran_ext.nn import AttentionModule


class Residual(nn.Module):
    """A network with a layer that is called twice, one that is not called, and a list of layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.parts = nn.ModuleList([nn.Conv2d(16, 24, 3, stride=2, padding=1)])
        self.unused = nn.Conv2d(3, 3, 1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(self.block(x) + x)
        for part in self.parts:
            x = part(x)
        return self.head(self.flat(F.adaptive_avg_pool2d(x, 1)))


WHERE = ["stem", "block", "parts.0"]
IMAGES = torch.randn(4, 3, 14, 11, generator=torch.Generator().manual_seed(0))


def attached(model=None, **options):
    return attach_attention(model or Residual(), WHERE, IMAGES, **options)


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_the_same_bit_for_bit_before_training(training):
    model = Residual().train(training)
    twin = attached(copy.deepcopy(model), depth=2)
    assert all(module.training is training for module in twin.modules())
    assert same_bits(twin(IMAGES), model(IMAGES))
    found = [name for name, module in twin.named_modules() if isinstance(module, AttentionModule)]
    assert found == [f"{name}.attached_attention.module" for name in WHERE]


def test_the_old_keys_stay_and_load():
    model = Residual()
    old = model.state_dict()
    twin = attached()
    assert set(old) < set(twin.state_dict())
    missing, unexpected = twin.load_state_dict(old, strict=False)
    assert not unexpected
    assert all(".attached_attention." in key for key in missing)
    assert same_bits(twin.eval()(IMAGES), model.eval()(IMAGES))
    attached().load_state_dict(twin.state_dict())


def test_bits_hold_where_the_module_is_not_finite_and_of_negative_zeros():
    class Broken(nn.Module):
        def forward(self, x):
            return x * torch.tensor([float("nan"), float("inf"), 2.0]).view(1, 3, 1, 1)

    x = torch.tensor([-0.0, 0.0, 1.5, float("inf"), float("nan"), 1e-45]).view(1, 1, 2, 3).repeat(2, 3, 1, 1)
    layer = AttachedAttention(Broken(), 3)
    out = layer(x)
    assert same_bits(out, x)
    layer(x[..., :1]).sum().backward()  # zeros: NaN, NaN and 0 by the module
    assert layer.gain.grad.isfinite().all()


def test_the_gain_and_then_the_module_learn():
    torch.manual_seed(1)
    layer, x = AttachedAttention(nn.Conv2d(4, 4, 1).double(), 4).double(), torch.randn(2, 4, 3, 3).double()
    change = layer.module(x) - x
    layer(x).mul(2).sum().backward()
    torch.testing.assert_close(layer.gain.grad, 2 * change.sum((0, 2, 3)))
    assert layer.module.weight.grad.abs().max() == 0
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([0.0, 0.5, -1.0, 2.0]))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(layer(leaf), x + layer.gain.view(1, 4, 1, 1) * change)
    assert torch.autograd.gradcheck(layer, (leaf,))
    layer(leaf).square().sum().backward()
    assert layer.module.weight.grad.abs().max() > 0


def test_training_lowers_the_loss_by_the_attached_modules_alone():
    torch.manual_seed(0)
    model, labels = attached(depth=[3, 2, 1]), torch.randint(5, (4,))
    own = [p for name, p in model.named_parameters() if "attached_attention" in name]
    optimizer = torch.optim.Adam(own, 1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(IMAGES), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_modules_of_their_own(copied):
    model = attached().eval()
    gain = "stem.attached_attention.gain"
    with torch.no_grad():
        model.get_parameter(gain).fill_(1)
    twin = copied(model)
    before = model(IMAGES)
    torch.testing.assert_close(twin(IMAGES), before)
    with torch.no_grad():
        twin.get_parameter(gain).zero_()
    torch.testing.assert_close(model(IMAGES), before)
    assert not torch.allclose(twin(IMAGES), before)


def test_finding_the_channels_leaves_statistics_modes_and_hooks_alone():
    model = Residual()
    model.bn.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="depth 9"):
        attached(model, depth=[1, 1, 9])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_channels_may_be_given_and_options_reach_the_module():
    model = attach_attention(
        Residual(), WHERE, channels=[16, 16, 24], depth=1, attention="channel", t=1, residual=False
    )
    module = model.parts[0].attached_attention.module
    assert (module.gate.attention, module.gate.residual, len(module.trunk)) == ("channel", False, 1)
    assert module.mask.conv1.in_channels == 24
    assert model(IMAGES).shape == (4, 5)


def test_dtype_and_device_are_the_networks():
    model = attach_attention(Residual().double(), WHERE, IMAGES.double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.device("meta"):
        shapes = Residual()
    assert attach_attention(shapes, ["stem"], channels=[16]).stem.attached_attention.gain.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_dtypes_and_bits_stay(dtype):
    model = Residual().eval()
    twin, outs = attached(copy.deepcopy(model), depth=2), []
    for network in (model, twin):
        network.block.register_forward_hook(lambda _layer, _args, out: outs.append(out))
        with torch.autocast("cpu", dtype):
            outs.append(network(IMAGES))
    assert {out.dtype for out in outs} == {dtype}
    assert torch.equal(outs[0].view(torch.int16), outs[2].view(torch.int16))
    assert torch.equal(outs[1], outs[3])


def test_folds_for_inference_and_explains(capsys):
    torch.manual_seed(0)
    model, images = ran_compact(width=0.125).eval(), torch.randn(2, 3, 32, 32)
    attach_attention(model, ["conv1", "stage1.0.conv2", "stage2", "stage3.1"], images)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("attached_attention.gain"):
                p.normal_()
        torch.testing.assert_close(fold_for_inference(model)(images), model(images), rtol=1e-4, atol=1e-4)
    explain(model, images)
    assert "stage2.attached_attention.module.gate" in capsys.readouterr().out


def test_behind_layers_of_converted_networks_and_of_this_packages_own():
    where = [*WHERE, "bn"]
    model = attach_attention(Residual(), where, IMAGES).eval()
    with torch.no_grad():
        for name in where:
            model.get_parameter(f"{name}.attached_attention.gain").normal_()
        expected = model(IMAGES)
        torch.testing.assert_close(convert(copy.deepcopy(model))(IMAGES), expected, rtol=1e-4, atol=1e-5)
    own = ran_compact(width=0.125).eval()
    images = torch.randn(2, 3, 32, 32)
    before = own(images)
    assert same_bits(attach_attention(own, ["stage3", "conv1", "stage1.0.conv2"], images)(images), before)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: attach_attention(Residual(), ["blok"], IMAGES), "no layer 'blok'; near it are block"),
        (lambda: attach_attention(Residual(), [""], IMAGES), "no layer ''"),
        (
            lambda: attach_attention(Residual(), "stem", IMAGES),
            "where must be a list of names, and not empty, got 'stem'",
        ),
        (lambda: attach_attention(Residual(), [], IMAGES), "where must be a list of names"),
        (lambda: attach_attention(Residual(), ["stem", "stem"], IMAGES), "stem would be attached to twice"),
        (lambda: attach_attention(attached(), ["block"], IMAGES), "block would be attached to twice"),
        (lambda: attach_attention(Residual(), ["parts"], IMAGES), "parts is a ModuleList, whose members"),
        (lambda: attach_attention(Residual(), ["relu"], IMAGES), "relu is called 2 times in a forward pass"),
        (lambda: attach_attention(Residual(), ["unused"], IMAGES), "unused is called 0 times in a forward pass"),
        (lambda: attach_attention(Residual(), ["head"], IMAGES), r"head must put out \(N, C, H, W\), got \[4, 5\]"),
        (
            lambda: attached(depth=5),
            "depth 5 needs 17x17 pixels or more, and stem puts out 14x11; a depth of at most 4 ",
        ),
        (lambda: attach_attention(Residual(), ["parts.0"], IMAGES[..., :2, :2]), "puts out 1x1; no depth fits"),
        (lambda: attached(depth=[1, 2]), r"depth must be whole numbers >= 1, one for each of 3 layers, got \[1, 2\]"),
        (lambda: attached(depth=0), "depth must be whole numbers >= 1"),
        (
            lambda: attach_attention(Residual(), WHERE),
            "give images, from which channels are found, or channels; one of",
        ),
        (lambda: attached(channels=[16] * 3), "one of the two"),
        (lambda: attached(attention="none"), "attention must be one of 'mixed'"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_sequential_that_runs_its_members_in_its_own_way_is_refused():
    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Twice(nn.Conv2d(8, 8, 1)))
    with pytest.raises(ValueError, match=r"1 is a Twice, an nn\.Sequential with a forward of its own"):
        attach_attention(model, ["1"], IMAGES)
    assert attach_attention(model, ["0"], IMAGES)(IMAGES).shape == (4, 8, 14, 11)


def test_no_module_is_an_error():
    with pytest.raises(TypeError, match=r"attach_attention: model must be an nn\.Module, got list"):
        attach_attention([], ["0"], IMAGES)
