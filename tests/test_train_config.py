"""The recipe: values, JSON, differences; the learning rate and the optimizers made of it."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ran_ext.data import Normalize
from ran_ext.train import PRESETS, Config, EarlyStopping, build_augment, build_optimizer, learning_rate, set_lr

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_round_trip(name):
    config = dataclasses.replace(PRESETS[name], model_options={"width": 0.25}, dropout=0.1, lr=0.3)
    text = config.to_json()
    assert Config.from_json(text) == config
    assert json.loads(text)["model_options"] == {"width": 0.25}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "resnet"),
        ("optimizer", "sgd"),
        ("schedule", "linear"),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("epochs", True),
        ("patience", -1),
        ("dropout", 1.0),
        ("lr", 0.0),
        ("lr", "0.1"),
        ("ema", 1.0),
        ("lr_step_factor", 0.0),
        ("weight_decay", -1e-3),
        ("channels_last", 1),
        ("mixup", 1),
        ("cutout", -2),
        ("model_options", {"dropout": 0.1}),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"Config: {field} must be .*got"):
        Config(**{field: value})


def test_cutout_needs_augmentation():
    with pytest.raises(ValueError, match="cutout must be 0 where augment is 'none', got 8"):
        Config(augment="none", cutout=8)


@pytest.mark.parametrize(("augment", "crop"), [("report", 0), ("light", 2), ("standard", 4)])
def test_augmentation_is_what_the_recipe_names(augment, crop):
    built = build_augment(Config(augment=augment, cutout=6), Normalize(torch.zeros(3, 1, 1)))
    assert (built.crop, built.cutout, built.rotation > 0) == (crop, 6, augment == "report")


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 3}'])
def test_bad_json_is_refused(text):
    with pytest.raises(ValueError, match="Config: "):
        Config.from_json(text)


def test_model_options_that_do_not_fit_name_the_model():
    with pytest.raises(ValueError, match=r"model_options do not fit ran_base.*depth"):
        Config(model="ran_base", model_options={"depth": 3}).create_model()


def test_dropout_reaches_the_model():
    assert Config(dropout=0.3).create_model().dropout.p == 0.3
    assert Config().create_model().dropout.p == 0.5


def test_step_schedule_shrinks_tenfold_every_twenty_epochs():
    rates = [learning_rate(Config(optimizer="nesterov"), 7 * epoch + 6, 7) for epoch in (0, 19, 20, 39, 40)]
    assert rates == [0.1, 0.1, 0.01, 0.01, 0.001]


@given(
    schedule=st.sampled_from(["onecycle", "cosine"]),
    epochs=st.integers(1, 30),
    steps=st.integers(1, 40),
    warmup=st.floats(0, 0.9),
)
def test_smooth_schedules_rise_once_and_fall_to_nearly_zero(schedule, epochs, steps, warmup):
    config = Config(schedule=schedule, epochs=epochs, lr=1.0, warmup=warmup)
    rates = [learning_rate(config, step, steps) for step in range(epochs * steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1.0


def test_onecycle_is_torchs_linear_then_cosine():
    config = Config(schedule="onecycle", epochs=4, lr=1.0, warmup=0.25)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for step in range(10, 40):
        assert learning_rate(config, step, 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("nesterov", torch.optim.SGD)])
def test_optimizer_is_torchs_with_decay_on_weights_alone(name, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, Config(optimizer=name, weight_decay_scope="all", weight_decay=0.01), CPU)
    assert type(optimizer) is kind
    assert all(group["fused"] for group in optimizer.param_groups)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p.dim() > 1: decays[id(p)] for p in model.parameters()} == {True: 0.01, False: 0.0}
    dense = build_optimizer(model, Config(optimizer=name), CPU)
    assert {group["weight_decay"] for group in dense.param_groups} == {0.0}


def test_nesterov_follows_its_formula():
    weight = nn.Parameter(torch.tensor([1.0]))
    model = nn.Module()
    model.weight = weight
    optimizer = build_optimizer(model, Config(optimizer="nesterov", lr=0.5), CPU)
    velocity, expected = 0.0, 1.0
    for gradient in (0.2, -0.4, 0.1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        expected -= 0.5 * (gradient + 0.9 * velocity)
    assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_set_lr_keeps_a_tensor_in_place():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    tensor = optimizer.param_groups[0]["lr"]
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert tensor.item() == 0.25


def test_early_stopping_waits_for_its_patience():
    stopping = EarlyStopping(patience=3)
    assert [stopping.update(epoch, value) for epoch, value in enumerate((0.3, 0.5, 0.5, 0.4))] == [
        True,
        True,
        False,
        False,
    ]
    assert not stopping.should_stop
    stopping.update(4, 0.1)
    assert stopping.should_stop
    assert stopping.best_epoch == 1
    assert not EarlyStopping(patience=0, bad_epochs=99).should_stop
