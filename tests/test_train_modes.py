"""The modes that a user set are there afterwards, module by module; what was frozen stays so in training."""

import dataclasses

import pytest
import torch
from tiny_run import CONFIG, images, network, train
from torch import nn

from ran_ext._attention_maps import attention_maps, attention_masks
from ran_ext._wrappers import evaluating
from ran_ext.data import Normalize
from ran_ext.models import create_model
from ran_ext.train import Ranks, evaluate, load_checkpoint


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def with_frozen_norms():
    model = create_model("ran_compact", width=0.125)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert len(set(modes(model).values())) == 2
    return model


@pytest.mark.parametrize("look", [attention_maps, attention_masks], ids=lambda look: look.__name__)
def test_looking_at_masks_leaves_each_module_in_its_mode(look):
    model = with_frozen_norms()
    before = modes(model)
    assert look(model, torch.randn(1, 3, 32, 32))
    assert modes(model) == before


def test_evaluate_leaves_each_module_in_its_mode():
    model = with_frozen_norms()
    before = modes(model)
    evaluate(model, images(20), Normalize.per_pixel(images(20)))
    assert modes(model) == before


def test_an_error_restores_the_modes_too():
    model = with_frozen_norms()
    before = modes(model)
    with pytest.raises(ValueError, match="images must be"):
        attention_maps(model, torch.randn(1, 1, 32, 32))
    assert modes(model) == before
    assert not model.stage1[1].gate._forward_hooks


def test_what_a_module_does_in_train_is_undone():
    """As adapters do that merge their weights for evaluation."""

    class Merging(nn.Module):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging())
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_batch_normalisation_keeps_its_statistics_in_fit(tmp_path, frozen):
    model = network()
    if frozen:
        model[1].eval()
    before = model[1].running_mean.clone()
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append((module.training, model[4].training)))
    train(tmp_path, model, dataclasses.replace(CONFIG, ema=0.0))  # an average would be validated in its place
    assert torch.equal(model[1].running_mean, before) == frozen
    assert set(seen) == {(not frozen, True), (False, False)}
    assert torch.equal(load_checkpoint(tmp_path / "model.pt")["model"]["1.running_mean"], before) == frozen


def test_a_model_that_is_wholly_in_evaluation_mode_is_trained_as_a_whole(tmp_path):
    model = network().eval()
    before = model[1].running_mean.clone()
    train(tmp_path, model)
    assert not torch.equal(model[1].running_mean, before)
    assert not model.training


def test_frozen_modules_stay_frozen_where_statistics_are_synchronised():
    model = with_frozen_norms()
    frozen = [name for name, training in modes(model).items() if not training]
    converted = Ranks(0, 2, torch.device("cpu")).convert(model)
    assert [name for name, training in modes(converted).items() if not training] == frozen
