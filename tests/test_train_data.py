"""Data sets, augmentations and settings that fit cannot act upon in full are refused."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_run import CONFIG, images, network, train
from torch import nn
from torch.utils.data import TensorDataset

from ran_ext.data import CIFAR10, Augment, Batches, Normalize, split_validation
from ran_ext.train import Config, evaluate, fit, load_checkpoint
from ran_ext.train.system import require_memory

OTHER = TensorDataset(torch.zeros(8, 3, 32, 32), torch.zeros(8))


def of(labels, channels=3, dtype=torch.uint8):
    data = images().subset(torch.arange(0))
    generator = torch.Generator().manual_seed(0)
    data.labels = torch.as_tensor(labels)
    data.images = torch.randint(256, (len(data.labels), channels, 8, 8), generator=generator).to(dtype)
    return data


@pytest.mark.parametrize("argument", ["train_set", "val_set", "test_set"])
def test_fit_names_the_data_set_that_is_none(tmp_path, argument):
    sets = {"train_set": images(), "val_set": images(20), "test_set": None} | {argument: OTHER}
    with pytest.raises(TypeError, match=rf"fit: {argument} must give whole numbers as labels, got torch\.float32"):
        fit(network(), config=CONFIG, out_dir=tmp_path / "run", **sets)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda data: Batches(data, 2),
        lambda data: split_validation(data, 2),
    ],
    ids=["Batches", "split_validation"],
)
def test_others_name_it_too(call, request):
    name = request.node.callspec.id
    with pytest.raises(TypeError, match=f"{name}: dataset must be ran_ext.data.Images, got TensorDataset"):
        call(OTHER)
    with pytest.raises(TypeError, match=rf"{name}: dataset must hold images, uint8 \(N, C, H, W\).*got torch.float32"):
        call(of([0, 1, 2], dtype=torch.float32))
    with pytest.raises(TypeError, match=f"{name}: dataset must hold labels from 0 on, got -1"):
        call(of([0, -1, 2]))


def test_a_hold_out_takes_from_every_class_that_there_is():
    hundred = of([label for label in range(100) for _ in range(4)])
    rest, held = split_validation(hundred, 100)
    assert held.labels.bincount(minlength=100).tolist() == [1] * 100
    assert rest.labels.bincount(minlength=100).tolist() == [3] * 100
    five = of([label for label in (0, 1, 2, 3, 4) for _ in range(20)])
    assert split_validation(five, 50)[1].labels.bincount().tolist() == [10] * 5
    odd = of([7] * 5 + [40] * 5)
    assert split_validation(odd, 5)[1].labels.bincount()[[7, 40]].tolist() == [3, 2]
    uneven = of([0] * 60 + [1] * 30 + [2] * 10)
    assert split_validation(uneven, 20)[1].labels.bincount().tolist() == [12, 6, 2]
    rest, held = split_validation(of([0] * 97 + [1] * 2), 3)
    assert (rest.labels.bincount().tolist(), held.labels.bincount().tolist()) == ([95, 1], [2, 1])
    for count in (-1, 1, 7):
        with pytest.raises(ValueError, match=rf"count must be 0, or from 2, .* to 6, .* got {count} of 8 images"):
            split_validation(of([7] * 5 + [40] * 3), count)
    with pytest.raises(ValueError, match="class 40 has one image, which cannot be in both parts"):
        split_validation(of([7] * 5 + [40]), 2)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_normalised_as_any(channels):
    data = of([0, 1] * 50, channels)
    x = Normalize.per_channel(data)(data.images)
    assert x.shape == data.images.shape
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(channels))


def test_a_channel_that_never_changes_cannot_be_divided_by_its_deviation():
    data = of([0, 1])
    data.images[:, 1] = 7
    with pytest.raises(ValueError, match=r"Normalize: std must be positive, got 0\.0"):
        Normalize.per_channel(data)


@pytest.mark.parametrize("change", [{}, {"mixup": True}])
def test_a_model_with_too_few_outputs_is_refused(tmp_path, change):
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"fit: the model must return logits .* for each label up to 9, got \[8, 3\]"):
        train(tmp_path, model, dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=r"evaluate: the model must return logits"):
        evaluate(model, images(20), Normalize.per_pixel(images()))


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_a_function_s_images_are_normalised_as_validation_s_are(tmp_path):
    """Without change it gives what no augmentation gives, so the normalisation is the same."""
    given = train(tmp_path / "given", augment=lambda images: images)
    plain = train(tmp_path / "plain", config=dataclasses.replace(CONFIG, augment="none"))
    assert [row.train_loss for row in given.figures] == [row.train_loss for row in plain.figures]
    inputs = []
    model = network()
    model[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].mean().item()))
    train(tmp_path / "seen", model, augment=lambda images: images.flip(3))
    assert all(abs(mean) < 0.15 for mean in inputs)


@pytest.mark.parametrize("wrong", [lambda images: images.float() / 255, lambda images: list(images)])
def test_a_function_that_returns_anything_else_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"fit: augment must return uint8 images, got (torch\.float32|list)"):
        train(tmp_path, augment=wrong)


def test_an_augment_must_normalise_as_validation_does(tmp_path):
    train(tmp_path / "same", augment=Augment(Normalize.per_pixel(images()), cutout=4))
    for other in (Normalize(torch.zeros(3, 32, 32)), Normalize.per_channel(images())):
        with pytest.raises(ValueError, match="fit: augment must normalise as validation does"):
            train(tmp_path / "other", augment=Augment(other))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"momentum": 0.5}, "config.momentum has no effect where optimizer is 'adam', got 0.5"),
        ({"schedule": "cosine", "warmup": 0.5}, "config.warmup has no effect where schedule is 'cosine', got 0.5"),
        ({"schedule": "onecycle", "lr_step_factor": 0.5}, "config.lr_step_factor has no effect"),
        ({"schedule": "constant", "lr_step_epochs": 2}, "config.lr_step_epochs has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        train(tmp_path, config=dataclasses.replace(CONFIG, **change))


def test_cutout_beside_an_augmentation_of_one_s_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"augment takes the place of config.cutout, which must be 0, got 4"):
        train(tmp_path, config=dataclasses.replace(CONFIG, cutout=4), augment=lambda images: images)


#: Every field that a run acts upon, and a value that must change what it computes.
ACTS = {
    "optimizer": {"optimizer": "nesterov"},
    "lr": {"lr": 0.01},
    "momentum": {"optimizer": "nesterov", "momentum": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "weight_decay_scope": {"weight_decay": 0.5, "weight_decay_scope": "dense"},
    "schedule": {"schedule": "cosine"},
    "lr_step_epochs": {"lr_step_epochs": 1},
    "lr_step_factor": {"lr_step_epochs": 1, "lr_step_factor": 0.5},
    "warmup": {"schedule": "onecycle", "warmup": 0.6},
    "batch_size": {"batch_size": 10},
    "augment": {"augment": "none"},
    "cutout": {"cutout": 16},
    "mixup": {"mixup": True},
    "normalize": {"normalize": "per_channel"},
    "label_smoothing": {"label_smoothing": 0.3},
    "dtype": {"dtype": "bfloat16"},
    "seed": {"seed": 1},
}
BESIDE = {
    "dtype": {"dtype": "float32"},
    "momentum": {"optimizer": "nesterov"},
    "weight_decay_scope": {"weight_decay": 0.5},
    "lr_step_factor": {"lr_step_epochs": 1},
    "warmup": {"schedule": "onecycle"},
}


class WithPenalty(nn.Sequential):
    def l2_penalty(self):
        return self[5].weight.square().sum()


@pytest.mark.parametrize("name", ACTS)
def test_every_setting_acts(tmp_path, name):
    config = dataclasses.replace(CONFIG, epochs=2)
    losses = []
    for number, change in enumerate((BESIDE.get(name, {}), ACTS[name])):
        out = tmp_path / str(number)
        train(out, WithPenalty(*network()), dataclasses.replace(config, **change))
        losses.append(load_checkpoint(out / "last.pt")["model"]["5.weight"])
    assert not torch.equal(*losses)


def test_numbers_of_numpy_make_a_checkpoint_that_can_be_read(tmp_path):
    config = dataclasses.replace(CONFIG, lr=np.float64(0.01), model_options={"width": np.float64(0.5)})
    train(tmp_path, config=config)
    assert load_checkpoint(tmp_path / "last.pt")["config"]["lr"] == 0.01
    train(tmp_path, config=config, resume=True)


@pytest.mark.parametrize("options", [{"width": torch.ones(1)}, {"width": {1, 2}}, {3: 1}, [1]])
def test_model_options_must_be_json(options):
    with pytest.raises(ValueError, match="model_options must be a mapping of JSON's types"):
        Config(model_options=options)


@pytest.mark.parametrize(("field", "value"), [("lr", 10**400), ("weight_decay", float("inf")), ("seed", 2**63)])
def test_numbers_without_end_are_refused(field, value):
    with pytest.raises(ValueError, match=f"Config: {field} must be"):
        Config(**{field: value})


def test_a_whole_number_is_a_learning_rate(tmp_path):
    assert isinstance(Config(lr=1).base_lr, float)


def test_counting_parameters_draws_no_random_numbers():
    torch.manual_seed(0)
    model = Config(model_options={"width": 0.125}).create_model()
    torch.manual_seed(0)
    from ran_ext.models import create_model

    assert torch.equal(model.fc.weight, create_model("ran_compact", width=0.125).fc.weight)


def test_a_network_larger_than_the_memory_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match=r"the network has [\d,]{15,} parameters, which take [\d,]+ GB, but cpu has"):
        Config(model_options={"width": 1e5}).create_model()
    require_memory(10**6, 4, torch.device("cpu"))


def test_checkpoint_every_must_be_a_count(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        train(tmp_path, checkpoint_every=0)


def test_a_subset_is_a_data_set(tmp_path):
    assert isinstance(images().subset(torch.arange(3)), CIFAR10)
