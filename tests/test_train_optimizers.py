"""fit(optimizer=..., scheduler=...) takes torch's own: the same bits as a plain loop, also when it is interrupted."""

import dataclasses

import pytest
import torch
from test_train_fit import InterruptAt, assert_equal
from tiny_run import network
from torch import nn, optim
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

from ran_ext.data import CIFAR10
from ran_ext.train import (
    CheckpointError,
    Config,
    Ranks,
    build_normalize,
    evaluate,
    fit,
    load_checkpoint,
    save_checkpoint,
    train_batches,
)
from ran_ext.train.step import choose_step

CONFIG = Config(
    weight_decay=0.0,
    batch_size=8,
    epochs=3,
    patience=0,
    select="last",
    dtype="float32",
)
ALONE = Ranks(0, 1, torch.device("cpu"))
IMAGES = CIFAR10.sample("train").subset(torch.arange(40))
VALIDATION = CIFAR10.sample("test").subset(torch.arange(20))
STEPS = 5

#: An optimizer over a model's parameters, a scheduler over it, and when that moves on.
PAIRS = {
    "AdamW, OneCycleLR": (
        lambda p: optim.AdamW(p, lr=1e-3),
        lambda o: schedulers.OneCycleLR(o, max_lr=5e-3, total_steps=3 * STEPS),
        "step",
    ),
    "SGD, MultiStepLR": (
        lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
        lambda o: schedulers.MultiStepLR(o, [1, 2], gamma=0.3),
        "epoch",
    ),
    "RMSprop, SequentialLR": (
        lambda p: optim.RMSprop(p, lr=1e-3),
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
        ),
        "step",
    ),
    "Adafactor, LambdaLR": (
        lambda p: optim.Adafactor(p, lr=1e-2),
        lambda o: schedulers.LambdaLR(o, lambda epoch: 0.5**epoch),
        "epoch",
    ),
    "NAdam, ReduceLROnPlateau": (
        lambda p: optim.NAdam(p, lr=2e-3),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0, factor=0.1),
        "epoch",
    ),
    "Adagrad": (lambda p: optim.Adagrad(p, lr=1e-2), lambda o: None, "epoch"),
}


class CountingSGD(optim.SGD):
    """Keeps a Python number and None for each parameter, as optimizers outside of torch do."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["steps"], state["nothing"] = state.get("steps", 0) + 1, None
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"] / state["steps"])


PAIRS["CountingSGD"] = (lambda p: CountingSGD(p, lr=0.1), lambda o: None, "epoch")


def start(pair):
    model = network()
    make_optimizer, make_scheduler, interval = PAIRS[pair]
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, make_scheduler(optimizer), interval


def run(pair, out, **options):
    model, optimizer, scheduler, interval = start(pair)
    own = {"optimizer": optimizer, "scheduler": scheduler, "scheduler_interval": interval}
    result = fit(model, IMAGES, VALIDATION, CONFIG, out, ranks=ALONE, quiet=True, **{**own, **options})
    return model, result


def plain_loop(pair):
    """The final weights, and the learning rate of each epoch's last step."""
    model, optimizer, scheduler, interval = start(pair)
    normalize = build_normalize(IMAGES, CONFIG)
    batches, rates = train_batches(IMAGES, CONFIG, ALONE, normalize), []
    torch.manual_seed(CONFIG.seed)
    for epoch in range(CONFIG.epochs):
        batches.set_epoch(epoch)
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            if scheduler and interval == "step":
                scheduler.step()
        rates.append(float(rate))
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(evaluate(model, VALIDATION, normalize).loss)
        elif scheduler and interval == "epoch":
            scheduler.step()
    return model.state_dict(), rates


@pytest.mark.parametrize("pair", PAIRS)
def test_fit_is_the_plain_loop(pair, tmp_path):
    weights, rates = plain_loop(pair)
    model, result = run(pair, tmp_path)
    assert_equal(model.state_dict(), weights, "weights")
    assert [row.lr for row in result.figures] == rates
    if "," in pair:
        assert len(set(rates)) == CONFIG.epochs  # the scheduler has changed something in each


@pytest.mark.parametrize("pair", PAIRS)
def test_an_interrupted_run_goes_on_bit_for_bit(pair, tmp_path, monkeypatch):
    weights, rates = plain_loop(pair)
    monkeypatch.setattr("ran_ext.train.report.Progress.due", True)
    assert run(pair, tmp_path, callbacks=[InterruptAt(7)])[1].interrupted
    model, result = run(pair, tmp_path, resume=True)
    assert_equal(model.state_dict(), weights, "weights")
    assert [row.lr for row in result.figures] == rates


def test_a_checkpoint_is_of_its_optimizer(tmp_path):
    run("AdamW, OneCycleLR", tmp_path)
    assert load_checkpoint(tmp_path / "last.pt")["asked"]["optimizer"] == "AdamW, OneCycleLR each step"
    with pytest.raises(RuntimeError, match="the optimizer is SGD, MultiStepLR each epoch here and AdamW, OneCycleLR"):
        run("SGD, MultiStepLR", tmp_path, resume=True)
    with pytest.raises(RuntimeError, match="the optimizer is of the recipe here and AdamW, OneCycleLR each step there"):
        run("AdamW, OneCycleLR", tmp_path, resume=True, optimizer=None, scheduler=None)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run("AdamW, OneCycleLR", tmp_path)
    good = load_checkpoint(tmp_path / "last.pt")
    groups = good["optimizer"]["param_groups"]
    fewer = {**good["optimizer"], "param_groups": [{**groups[0], "params": groups[0]["params"][1:]}]}
    entry = {**good["optimizer"], "state": {**good["optimizer"]["state"], 0: {"step": [1]}}}
    for change, match in (
        ({"scheduler": None}, "'scheduler' must be that of AdamW, OneCycleLR each step, got None"),
        ({"scheduler": 3}, "'scheduler' must be a dict, got 3"),
        ({"optimizer": fewer}, "must be of as many parameters as the network has here"),
        ({"optimizer": entry}, "'optimizer.state\\[0\\].step' must be a tensor or a number, got list"),
    ):
        save_checkpoint(tmp_path / "last.pt", {**good, **change})
        with pytest.raises(CheckpointError, match=match):
            run("AdamW, OneCycleLR", tmp_path, resume=True)


def test_an_older_checkpoint_has_no_scheduler(tmp_path):
    model = network()
    fit(model, IMAGES, VALIDATION, CONFIG, tmp_path, ranks=ALONE, quiet=True)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state.pop("scheduler") is None
    save_checkpoint(tmp_path / "last.pt", state)
    resumed = fit(network(), IMAGES, VALIDATION, CONFIG, tmp_path, ranks=ALONE, resume=True, quiet=True)
    assert len(resumed.figures) == CONFIG.epochs


def test_no_graph_is_captured_of_numbers_that_change():
    assert choose_step("graph", ALONE, own_optimizer=True) == (
        "eager",
        "a CUDA graph would freeze the numbers that the given optimizer and scheduler change",
    )
    assert choose_step("graph", ALONE) == ("graph", "")
    on_gpu = Ranks(0, 1, torch.device("cuda"))
    assert [choose_step("auto", on_gpu, own)[0] for own in (False, True)] == ["graph", "eager"]


def test_what_does_not_fit_together_is_refused(tmp_path):
    model = network()
    own = optim.SGD(model.parameters(), lr=0.1)
    other = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    plateau = schedulers.ReduceLROnPlateau(own)
    another = optim.SGD(model.parameters(), lr=0.1)

    def refused(error, match, config=CONFIG, val_set=VALIDATION, **options):
        with pytest.raises(error, match=match):
            fit(model, IMAGES, val_set, config, tmp_path / "run", ranks=ALONE, quiet=True, **options)

    refused(TypeError, r"optimizer must be a torch\.optim\.Optimizer, got str", optimizer="adam")
    refused(ValueError, "step without a closure, got LBFGS", optimizer=optim.LBFGS(model.parameters()))
    refused(ValueError, "over model's parameters, got one over others", optimizer=other)
    refused(ValueError, "scheduler needs the optimizer that it is over", scheduler=plateau)
    refused(TypeError, "scheduler must be a .*LRScheduler, got 3", optimizer=own, scheduler=3)
    refused(ValueError, "over the optimizer that fit is given", optimizer=another, scheduler=plateau)
    refused(ValueError, "must be epoch or step, got 'batch'", optimizer=own, scheduler_interval="batch")
    refused(ValueError, "must be epoch for Reduce", optimizer=own, scheduler=plateau, scheduler_interval="step")
    refused(ValueError, "ReduceLROnPlateau needs val_set", val_set=None, optimizer=own, scheduler=plateau)
    for change in ({"lr": 0.5}, {"schedule": "cosine"}, {"optimizer": "nesterov"}):
        name = next(iter(change))
        text = f"{name} has no effect where fit is given an optimizer"
        refused(ValueError, text, config=dataclasses.replace(CONFIG, **change), optimizer=own)
    decay = dataclasses.replace(CONFIG, weight_decay=1e-3, weight_decay_scope="all")
    refused(ValueError, "weight_decay must be 0 or of scope 'dense' where fit is given", config=decay, optimizer=own)
    assert not (tmp_path / "run").exists()
