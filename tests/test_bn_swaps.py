"""A ReLU survives whatever takes the place of its batch normalisation; state_dicts of before still load."""

import copy

import pytest
import torch
from plain_twin import assert_same_training, plain_twin
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import ran_ext.nn
from ran_ext.models import ran_compact
from ran_ext.nn import BNReLU, BNReLUConv2d


def network() -> nn.Module:
    return ran_compact(width=0.125, dropout=0.0).double()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 12, 11, dtype=torch.float64)


def disturbed(module: nn.Module) -> nn.Module:
    """Statistics and scales that are not those of a new batch normalisation."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and ("bn" in name or tensor.dim() == 1):
            tensor.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_converter_keeps_every_relu(training):
    model = disturbed(network()).train(training)
    plain, x = plain_twin(model), images()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 59
    torch.testing.assert_close(converted(x), plain(x))
    assert list(converted.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("kind", ["none", "grouped", "other activation"])
@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_anything_in_the_place_of_a_networks_batch_normalisation(name, kind):
    model = network()
    channels = getattr(model, name).num_features
    make = {"none": nn.Identity, "grouped": lambda: nn.GroupNorm(2, channels), "other activation": nn.Tanh}[kind]
    setattr(model, name, make().double())
    assert_same_training(model, plain_twin(model), images())


def test_names_are_those_of_plain_pytorch_in_both_directions():
    plain = nn.ModuleDict({"bn1": nn.BatchNorm2d(8), "bn2": nn.BatchNorm2d(128)})
    keys = [key for key in network().state_dict() if key.startswith(("bn1.", "bn2."))]
    assert keys == list(plain.state_dict())
    assert set(dict(network().named_parameters())) <= set(network().state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("prefix", ["", "0.", "module.0."])
def test_keys_of_before_load(prefix, strict, assign):
    """BNReLU was an nn.BatchNorm2d itself: ``weight`` is now ``bn.weight``."""
    before = disturbed(nn.BatchNorm2d(8)).state_dict(prefix=prefix)
    layer = BNReLU(8)
    module = {"": layer, "0.": nn.Sequential(layer), "module.0.": nn.DataParallel(nn.Sequential(layer))}[prefix]
    copied = dict(before)
    assert module.load_state_dict(before, strict=strict, assign=assign) == ([], [])
    assert dict(before) == copied
    after = module.state_dict()
    assert [key.replace("bn.", "") for key in after] == list(before)
    assert all(torch.equal(new, old) for new, old in zip(after.values(), before.values(), strict=True))
    assert module.load_state_dict(copy.deepcopy(after), strict=strict, assign=assign) == ([], [])


def test_keys_that_do_not_belong_are_still_named():
    missing = ["bn.bias", "bn.running_mean", "bn.running_var"]
    with pytest.raises(RuntimeError, match="Missing key.*{}.*\n.*Unexpected key.*bn.wrong".format(".*".join(missing))):
        BNReLU(8).load_state_dict({"weight": torch.ones(8), "wrong": torch.ones(1)})
    found = BNReLU(8).load_state_dict({"bn.weight": torch.ones(8), "other": torch.ones(1)}, strict=False)
    assert found == (missing, ["bn.other"])


def test_statistics_are_estimated_anew_by_torchs_own_function():
    model, x = disturbed(network()), images(8)
    update_bn([x], model)
    stem = model.conv1(x)
    torch.testing.assert_close(model.bn1.running_mean, stem.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, stem.var((0, 2, 3)))


def test_names_of_before_are_still_there():
    with pytest.warns(DeprecationWarning, match=r"nn\.SyncBatchNorm\.convert_sync_batchnorm does the same"):
        converted = ran_ext.nn.convert_sync_batchnorm(nn.Sequential(BNReLU(8), BNReLUConv2d(8, 8, 1)))
    with pytest.warns(DeprecationWarning, match="SyncBNReLU is deprecated"):
        made = ran_ext.nn.SyncBNReLU(8, 1e-3, None, track_running_stats=False)
    assert type(converted[0].bn) is type(converted[1].bn) is type(made.bn) is nn.SyncBatchNorm
    assert (made.bn.eps, made.bn.momentum, made.bn.running_mean) == (1e-3, None, None)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(made(x), torch.relu(made.bn(x)))


def test_arguments_are_those_of_batch_norm():
    layer = BNReLU(6, 1e-2, 0.3, affine=False, track_running_stats=False, device="meta", dtype=torch.float64)
    assert repr(layer.bn) == repr(nn.BatchNorm2d(6, 1e-2, 0.3, False, False))
    assert BNReLU(6, device="meta", dtype=torch.float64).bn.weight.is_meta
