"""The reference: networks, steps and augmentation are ran_ext's, and a training does what its recipe says."""

import copy
import dataclasses
import doctest
import importlib

import pytest
import torch
from accuracy import error
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from benchmarks.reference import data, training
from benchmarks.reference.training import NETWORKS, Recipe, predict, train
from ran_ext import models
from ran_ext.data import CIFAR10, Augment, Normalize
from ran_ext.train import Config, TrainStep, build_optimizer

#: A training in which dropout, augmentation and the order draw numbers.
SMALL = Recipe(width=0.125, epochs=2, batch_size=16, patience=0)


@pytest.fixture(scope="module")
def sample():
    """40 training images and their labels."""
    part = CIFAR10.sample("train").subset(torch.arange(40))
    return part.images, part.labels


def run(recipe, sample, **options):
    return train(recipe, *sample, *sample, "cpu", **options)


def twins(name, width):
    """ran_ext's network and the reference's, without dropout, each with weights of its own."""
    options = {"dropout": 0.0, "width": width}
    return models.create_model(name, **options), NETWORKS[name](**options)


@pytest.mark.parametrize("module", ["data", "networks", "training"])
def test_examples(module):
    assert doctest.testmod(importlib.import_module(f"benchmarks.reference.{module}")).failed == 0


@pytest.mark.parametrize("to_reference", [True, False], ids=["to the reference", "to ran_ext"])
@pytest.mark.parametrize("width", [0.125, 0.4, 1.0])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_weights_carry_over(name, width, to_reference):
    ours, plain = twins(name, width)
    target, source = (plain, ours) if to_reference else (ours, plain)
    target.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), plain.eval()(images), rtol=1e-5, atol=1e-5)


#: Relative errors. Of logits and running statistics: a few roundings in each of 65 layers. Of the gradient: in float32
#: a normalised value may round to the other side of zero, and its ReLU then passes a gradient or none; over 6 seeds of
#: two networks that came to 0.03 at most.
OF_OUTPUTS, OF_GRADIENT = {torch.float64: 1e-13, torch.float32: 1e-5}, {torch.float64: 1e-13, torch.float32: 0.1}


@pytest.mark.parametrize(("width", "dtype"), [(1.0, torch.float32), (1.0, torch.float64), (0.125, torch.float64)])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_outputs_and_gradients_are_ran_exts(name, width, dtype):
    ours, plain = (network.to(dtype) for network in twins(name, width))
    plain.load_state_dict(ours.state_dict())
    images, labels = torch.randn(2, 3, 32, 32, dtype=dtype), torch.tensor([3, 9])
    logits = [network(images) for network in (ours, plain)]
    for rows in logits:
        F.cross_entropy(rows, labels).backward()
    gradients = [parameters_to_vector(p.grad for p in network.parameters()) for network in (ours, plain)]
    assert error(*logits) < OF_OUTPUTS[dtype]
    assert error(*gradients) < OF_GRADIENT[dtype]
    for (key, statistic), expected in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert error(statistic, expected) < OF_OUTPUTS[dtype], key


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_ten_training_steps_are_ran_exts(name):
    """In float64: Adam divides by the gradient's size, and so makes steps of roundings."""
    ours, plain = (network.double() for network in twins(name, 0.125))
    plain.load_state_dict(ours.state_dict())
    images, labels = torch.randn(10, 8, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (10, 8))
    losses = []
    for network in (ours, plain):
        optimizer = training.build_optimizer(network, Recipe())
        steps = (training.train_step(network, optimizer, x, y, l2=1e-3) for x, y in zip(images, labels, strict=True))
        losses.append([loss.item() for loss, _ in steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(set(losses[0])) == 10


@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_optimizer_and_penalty_are_ran_exts(name):
    """The same network under ran_ext's step and the reference's; few steps, as Adam's fused one rounds differently."""
    plain = NETWORKS["ran_compact"](dropout=0.0, width=0.125)
    other = copy.deepcopy(plain)
    config, l2 = Config(optimizer=name), 0.1
    step = TrainStep(
        other,
        build_optimizer(other, config, torch.device("cpu")),
        l2=l2,
        penalty=lambda: other.fc.weight.square().sum(),
    )
    optimizer = training.build_optimizer(plain, Recipe(optimizer=name))
    images, labels = torch.randn(4, 8, 3, 32, 32), torch.randint(0, 10, (4, 8))
    for x, y in zip(images, labels, strict=True):
        expected_loss, expected_correct = step(x, y)
        loss, correct = training.train_step(plain, optimizer, x, y, l2)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
        assert correct == expected_correct
    torch.testing.assert_close(plain.fc.weight, other.fc.weight, rtol=1e-3, atol=1e-5)


def test_move():
    image = torch.randn(3, 32, 32)
    for arguments, expected in (
        ((0, False, 0, 0), image),
        ((0, True, 0, 0), image.flip(2)),
        ((90, False, 0, 0), image.rot90(1, (1, 2))),
        ((0, False, 4 / 32, 0), F.pad(image, (4, 0))[:, :, :32]),
        ((0, False, 0, -4 / 32), F.pad(image, (0, 0, 0, 4))[:, 4:]),
    ):
        torch.testing.assert_close(data.move(image, *arguments), expected, rtol=0, atol=5e-5, msg=f"{arguments}")


def test_moves_are_ran_exts(sample):
    """For the same draws, as rows (angle, flip, x, y) of :meth:`Augment.draw`."""
    images, _ = sample
    mean = data.mean_image(images)
    draws = Augment.draw(len(images))
    expected = Augment(Normalize(mean))(images, draws=draws)
    for image, moved, (angle, flip, x, y) in zip(images, expected, draws[:4].T.tolist(), strict=True):
        picture = data.normalise(image, mean)
        got = data.move(picture, (2 * angle - 1) * 15, flip < 0.5, (1 - 2 * x) / 8, (1 - 2 * y) / 8)
        torch.testing.assert_close(got, moved, rtol=0, atol=5e-5)


def test_random_moves_spread_as_the_report_says(monkeypatch):
    monkeypatch.setattr(data, "move", lambda image, *drawn: torch.tensor(drawn))
    drawn = torch.stack([data.move_at_random(torch.empty(0)) for _ in range(4000)])
    largest = torch.tensor([15, 1, 0.125, 0.125])
    assert (drawn.abs() <= largest).all()
    assert ((drawn.mean(0) - torch.tensor([0, 0.5, 0, 0])).abs() < 0.05 * largest).all()
    uniform, coin = 1 / 3**0.5, 1 / 2  # standard deviations, the first in -1 ... 1
    spread = largest * torch.tensor([uniform, coin, uniform, uniform])
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.05, atol=0)


def test_pictures_have_the_mean_subtracted_before_they_are_moved(sample):
    images, labels = sample
    mean = data.mean_image(images)
    picture, label = data.Pictures(images, labels, mean, augment=False)[7]
    torch.testing.assert_close(picture, images[7] / 255 - images.double().mean(0).float() / 255)
    assert label == labels[7]
    grey = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    assert data.Pictures(grey, labels, data.mean_image(grey), augment=True)[0][0].abs().max() == 0


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 3e-3), ("nesterov", 0.02)])
def test_it_learns(sample, optimizer, lr):
    recipe = dataclasses.replace(SMALL, optimizer=optimizer, lr=lr, epochs=8, dropout=0.0, augment=False)
    figures = run(recipe, sample).figures
    assert figures[-1]["train_loss"] < 0.9 * figures[0]["train_loss"]


def test_training_figures_are_of_the_batches_as_trained_on(sample):
    images, labels = sample
    trained = run(dataclasses.replace(SMALL, epochs=1, batch_size=40, lr=0.0, dropout=0.0, augment=False), sample)
    logits = trained.network.train()(data.normalise(images, trained.mean))
    assert trained.figures[0]["train_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert trained.figures[0]["train_accuracy"] == (logits.argmax(1) == labels).sum().item() / 40


def test_the_last_epochs_weights_are_kept_and_each_epoch_is_told(sample):
    told = []
    trained = run(SMALL, sample, on_epoch=told.append)
    assert told == trained.figures
    last = told[-1]
    assert list(last) == ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"]
    assert [row["epoch"] for row in told] == [1, 2]
    images, labels = sample
    logits = predict(trained, images, batch_size=7)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(last["val_loss"], rel=1e-5)
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(last["val_accuracy"])
    assert 0 < told[0]["seconds"] < last["seconds"]


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_weights(sample, workers):
    recipe = dataclasses.replace(SMALL, workers=workers)
    first, again, other = (run(dataclasses.replace(recipe, seed=seed), sample).network for seed in (1, 1, 2))
    for (key, value), same in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, same), key
    assert not torch.equal(first.fc.weight, other.fc.weight)


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (2, 4), (3, 6)])
def test_training_stops_when_the_accuracy_has_stalled(sample, monkeypatch, patience, epochs):
    accuracies = iter([0.5, 0.6, 0.6, 0.4, 0.7, 0.1])
    monkeypatch.setattr(training, "validate", lambda *_: (1.0, next(accuracies)))
    trained = run(dataclasses.replace(SMALL, epochs=6, batch_size=40, patience=patience), sample)
    assert len(trained.figures) == epochs


@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
def test_the_learning_rate_falls_to_a_tenth(sample, optimizer):
    """Seen in how far the weights move in the second epoch, with a step before it and without."""
    recipe = dataclasses.replace(SMALL, optimizer=optimizer, lr=1e-3)

    def weights(**changes):
        return parameters_to_vector(run(dataclasses.replace(recipe, **changes), sample).network.parameters())

    start = weights(epochs=1)
    whole, tenth = ((weights(lr_step_epochs=epochs) - start).norm() for epochs in (20, 1))
    assert 0.08 < tenth / whole < 0.12


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: Recipe(network="resnet"), ValueError, "network must be one of ran_compact, ran_base, ran_paper, got"),
        (lambda: Recipe(optimizer="sgd"), ValueError, "optimizer must be one of adam, nesterov, got 'sgd'"),
        (lambda: data.normalise(torch.zeros(3, 32, 32), 0), TypeError, "must be uint8 in 0..255, got torch.float32"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
