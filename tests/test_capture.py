"""The captured step does what the eager one does, bit for bit: on a GPU as a CUDA graph, on the CPU as a stand-in."""

import copy
import dataclasses
import itertools
from functools import partial

import pytest
import torch
from cpu_graph import CpuGraph
from test_train_fit import CONFIG, InterruptAt, assert_equal, assert_same_state, run
from torch import nn

from ran_ext import _backend, set_backend, set_conv1x1, set_conv3x3
from ran_ext.data import CIFAR10, Augment, Batches, Normalize
from ran_ext.train import (
    CapturedStep,
    Config,
    CudaGraph,
    ExponentialMovingAverage,
    Ranks,
    StepHistory,
    TrainStep,
    build_optimizer,
    fit,
    load_checkpoint,
    load_optimizer,
    set_lr,
)
from ran_ext.train.step import CompiledModel, choose_step

gpu = pytest.mark.gpu
#: Of every step: it goes up and down.
RATES = [1e-3, 2e-3, 4e-3, 4e-3, 3e-3, 2e-3, 1e-3, 5e-4]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
CPU = Ranks(0, 1, torch.device("cpu"))
#: Of whole runs: ten steps.
SHORT = dataclasses.replace(CONFIG, epochs=2)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """On CUDA the library's convolutions are exact and in order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return torch.device(request.param)


@pytest.fixture(scope="module")
def images():
    return CIFAR10.sample("train").subset(torch.arange(40))


def new_graph(device):
    return CudaGraph(device) if device.type == "cuda" else CpuGraph()


class Training:
    """A network, its optimizer and average, and the whole step on batches of 8: two of them with one seed are alike."""

    def __init__(self, images, device, captured, **config):
        torch.manual_seed(3)
        config = {"dtype": "float32"} | config
        self.config = Config(model_options={"width": 0.125}, dropout=0.3, channels_last=True, **config)
        model = self.config.create_model().to(device, memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(model, self.config, device)
        self.ema = ExponentialMovingAverage(model, 0.9)
        scaler = torch.amp.GradScaler(device.type) if self.config.dtype == "float16" else None
        step = TrainStep(
            model,
            self.optimizer,
            l2=1e-3,
            penalty=model.l2_penalty,
            mix=self.config.mixup,
            dtype=self.config.torch_dtype,
            scaler=scaler,
            ema=(self.ema, model),
        )
        augment = Augment(Normalize.per_pixel(images, torch.channels_last), cutout=4)
        self.batches = Batches(images, 8, augment, generator=torch.Generator().manual_seed(5), device=device)
        self.model, self.reasons = model, []
        self.step = lambda indices, draws: step(*self.batches.load(indices, draws))
        if captured:
            self.step = CapturedStep(self.step, on_fallback=self.reasons.append, graph=new_graph(device))

    def run(self, rates):
        """Loss and right predictions of a step for each learning rate, then the state; epochs begin anew."""
        plans = itertools.chain.from_iterable(self.batches.plan() for _ in itertools.count())
        figures = []
        for lr, plan in zip(rates, plans, strict=False):
            set_lr(self.optimizer, lr)
            figures.append(torch.stack(self.step(*plan)))
        average = [*self.ema.average.state_dict().values(), self.ema.steps]
        return [figures, self.model.state_dict(), self.optimizer.state_dict(), average]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=gpu)])
@pytest.mark.parametrize("optimizer", ["adam", "nesterov", "muon"])
def test_captured_steps_are_the_eager_ones_bit_for_bit(images, device, optimizer, dtype):
    """Learning rate, order, augmentation, dropout, momentum, average and loss scale, over two epochs."""
    if dtype == "float16" and device.type == "cpu":
        pytest.skip("float16 is for CUDA")
    if dtype == "float16" and optimizer == "muon":
        pytest.skip("GradScaler reads back whether to skip a step of an optimizer that is not fused")
    eager = Training(images, device, captured=False, optimizer=optimizer, dtype=dtype).run(RATES)
    drawn = torch.rand(4, device=device)
    training = Training(images, device, captured=True, optimizer=optimizer, dtype=dtype)
    captured = training.run(RATES)
    assert training.reasons == []
    assert_equal(captured, eager, "captured")
    assert torch.equal(torch.rand(4, device=device), drawn)  # the generator stands where eager steps leave it
    assert len({figures[0].item() for figures in eager[0]}) == len(RATES)


def test_captured_mixup_draws_the_eager_ones_shares(images, device):
    eager = Training(images, device, captured=False, mixup=True).run(RATES)
    training = Training(images, device, captured=True, mixup=True)
    assert_equal(training.run(RATES), eager, "captured")
    assert training.reasons == []


def test_the_stand_in_sees_no_python_number_as_a_graph_does_not(device):
    """The control: without a learning rate in a tensor the captured step goes on with that of the capture."""
    weight = torch.zeros(1, device=device)
    group = {}
    step = CapturedStep(lambda x: weight.add_(x, alpha=group["lr"]), warm_up=1, graph=new_graph(device))
    for lr in (1.0, 10.0, 100.0):
        group["lr"] = lr
        step(torch.ones(1, device=device))
    assert weight.item() == 3.0


def test_capturing_runs_nothing(device):
    weight, calls = torch.zeros(1, device=device), []

    def add(x):
        calls.append(1)
        return weight.add_(x) * 2

    step = CapturedStep(add, warm_up=2, graph=new_graph(device))
    results = [step(torch.full((1,), x, device=device)).item() for x in (1.0, 2.0, 4.0, 8.0)]
    assert results == [2.0, 6.0, 14.0, 30.0]
    assert len(calls) == 3  # two warm-ups and the capture


def test_dropout_draws_anew_in_every_replay(device):
    step = CapturedStep(nn.functional.dropout, warm_up=1, graph=new_graph(device))
    ones = torch.ones(64, device=device)
    torch.manual_seed(0)
    masks = [step(ones).clone() for _ in range(6)]
    torch.manual_seed(0)
    assert_equal(masks, [nn.functional.dropout(ones) for _ in range(6)], "masks")
    assert len({tuple(mask.tolist()) for mask in masks}) == 6


def test_a_smaller_batch_runs_eagerly_between_replays(images, device):
    def figures(captured):
        training = Training(images, device, captured)
        training.batches.batch_size = 12  # 12, 12, 12, 4
        return training.run(RATES)

    assert_equal(figures(True), figures(False), "captured")


@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
def test_a_captured_step_goes_on_from_a_loaded_state(images, device, optimizer):
    training = Training(images, device, captured=True, optimizer=optimizer)
    training.run(RATES[:5])
    kept = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    random_state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    expected = copy.deepcopy(training.run(RATES)[:3])
    training.model.load_state_dict(kept[0])
    load_optimizer(training.optimizer, kept[1])
    torch.set_rng_state(random_state) if device.type == "cpu" else torch.cuda.set_rng_state(random_state)
    training.batches.set_epoch(1)
    assert_equal(training.run(RATES)[:3], expected, "loaded")


def test_an_optimizers_state_loads_across_devices_and_from_before_the_first_step():
    weight = nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight], lr=torch.tensor(0.1), fused=True)
    fresh = copy.deepcopy(adam.state_dict())
    fresh["param_groups"][0] |= {"lr": 0.5, "capturable": True}  # a number as lr, and CUDA's flag
    weight.grad = torch.ones(2)
    adam.step()
    held, lr = adam.state[weight]["exp_avg"], adam.param_groups[0]["lr"]
    load_optimizer(adam, fresh)
    assert adam.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5
    assert not adam.param_groups[0]["capturable"]
    assert adam.state[weight]["exp_avg"] is held
    assert held.tolist() == [0.0, 0.0]


def test_a_step_that_waits_for_the_device_runs_eagerly_with_the_reason(device):
    reasons = []
    step = CapturedStep(lambda x: x * x.sum().item(), on_fallback=reasons.append, graph=new_graph(device))
    assert [step(torch.full((1,), 2.0, device=device)).item() for _ in range(6)] == [4.0] * 6
    assert len(reasons) == 1
    assert "no CUDA graph can hold a step that waits for the device, as this one does at" in reasons[0]


def test_a_capture_that_fails_is_explained_and_the_training_goes_on(device):
    reasons, calls = [], itertools.count(1)

    def step(x):
        noise = nn.functional.dropout(x)
        if next(calls) == 3:  # in the capture alone, so that no warm-up shows it
            noise.sum().item()
        return noise

    captured = CapturedStep(step, warm_up=2, on_fallback=reasons.append, graph=new_graph(device))
    ones = torch.ones(64, device=device)
    torch.manual_seed(0)
    found = [captured(ones).clone() for _ in range(6)]
    torch.manual_seed(0)
    assert_equal(found, [nn.functional.dropout(ones) for _ in range(6)], "masks")
    assert len(reasons) == 1
    assert reasons[0].startswith("the capture in a CUDA graph failed: ")
    assert "\n" not in reasons[0]


def test_without_cuda_the_step_runs_eagerly_and_says_so():
    with pytest.warns(UserWarning, match="a CUDA graph needs a CUDA GPU, and this runs on cpu"):
        assert CapturedStep(torch.neg)(torch.ones(())).item() == -1.0


def test_at_least_one_step_comes_before_the_capture():
    with pytest.raises(ValueError, match="CapturedStep: warm_up must be at least 1, got 0"):
        CapturedStep(torch.neg, warm_up=0)


@pytest.fixture
def stand_in(monkeypatch):
    """``fit`` captures on the CPU."""
    monkeypatch.setattr("ran_ext.train.loop.CapturedStep", lambda *a, **k: CapturedStep(*a, **k, graph=CpuGraph()))


@pytest.fixture(scope="module")
def eager_run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("eager")
    return run(images, images, SHORT, out, step="eager", ranks=CPU), out


def test_fit_by_graph_is_fit_eagerly(images, eager_run, stand_in, tmp_path):
    result = run(images, images, SHORT, tmp_path, step="graph", ranks=CPU)
    assert (result.step, eager_run[0].step) == ("graph", "eager")
    assert_same_state(load_checkpoint(tmp_path / "last.pt"), load_checkpoint(eager_run[1] / "last.pt"))


class Read(torch.utils.data.Dataset):
    """The same images, read one by one."""

    def __init__(self, images):
        self.images, self.labels = images.images, images.labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index] - torch.randint(2, ()).byte(), self.labels[index]


def test_images_that_are_read_in_parts_of_a_batch_by_graph_too(images, stand_in, tmp_path):
    config = dataclasses.replace(SHORT, accumulate=2)
    for step in ("graph", "eager"):
        assert run(Read(images), images, config, tmp_path / step, step=step, ranks=CPU).step == step
    assert_same_state(load_checkpoint(tmp_path / "graph" / "last.pt"), load_checkpoint(tmp_path / "eager" / "last.pt"))


@pytest.mark.parametrize(("first", "then", "at"), [("graph", "eager", 5), ("eager", "graph", 1)])
def test_each_kind_resumes_the_others_checkpoints(images, eager_run, stand_in, monkeypatch, tmp_path, first, then, at):
    monkeypatch.setattr("ran_ext.train.report.Progress.due", True)  # so that the callback sees every step at once
    assert run(images, images, SHORT, tmp_path, step=first, ranks=CPU, callbacks=[InterruptAt(at)]).interrupted
    assert run(images, images, SHORT, tmp_path, step=then, ranks=CPU, resume=True).step == then
    assert_same_state(load_checkpoint(tmp_path / "last.pt"), load_checkpoint(eager_run[1] / "last.pt"))


def test_fit_says_why_it_runs_eagerly(images, tmp_path, caplog):
    config = dataclasses.replace(SHORT, epochs=1, select="last")
    result = fit(config.create_model(), images, None, config, tmp_path, step="graph", ranks=CPU)
    assert result.step == "eager"
    assert "the training step runs eagerly: a CUDA graph needs a CUDA GPU" in caplog.text


def test_choice_of_the_step():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_step("auto", Ranks(0, 1, cuda)) == ("graph", "")
    assert choose_step("auto", Ranks(0, 1, cpu)) == ("eager", "")
    assert choose_step("auto", Ranks(0, 2, cuda)) == ("eager", "")
    assert choose_step("compile", Ranks(0, 1, cpu)) == ("compile", "")
    assert choose_step("graph", Ranks(1, 2, cuda)) == (
        "eager",
        "the 2 processes exchange statistics and gradients within the step",
    )
    with pytest.raises(ValueError, match="fit: step must be one of auto, eager, graph, compile, got 'fast'"):
        choose_step("fast", Ranks(0, 1, cpu))


@pytest.mark.slow
def test_fit_compiles_the_network_whole(images, eager_run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    result = run(images, images, SHORT, tmp_path, step="compile", ranks=CPU)
    assert result.step == "compile"
    losses = [[row.train_loss for row in figures] for figures in (result.figures, eager_run[0].figures)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_model_that_does_not_compile_runs_eagerly_with_the_reason(monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    reasons, model = [], nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    twin = copy.deepcopy(model)
    compiled = CompiledModel(model, reasons.append)
    for _ in range(2):
        x = torch.randn(4, 3)
        assert torch.equal(compiled(x), twin(x))
    assert_equal(model.state_dict(), twin.state_dict(), "statistics")  # nothing ran twice
    assert len(reasons) == 1
    assert "no compiler" in reasons[0]


@pytest.fixture(params=["library", "fused"])
def native(request):
    """The package's own kernels, and who does its convolutions."""
    if not _backend.cuda_built():
        pytest.skip(f"no CUDA kernels: {_backend.why_not_native('cuda')}")
    with set_backend("native"), set_conv1x1(request.param), set_conv3x3(request.param):
        yield


@gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_fit_by_graph_is_fit_eagerly_on_a_gpu(images, device, tmp_path):
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    kinds = [run(images, images, SHORT, tmp_path / step, step=step, ranks=ranks).step for step in ("auto", "eager")]
    assert kinds == ["graph", "eager"]
    assert_same_state(load_checkpoint(tmp_path / "auto" / "last.pt"), load_checkpoint(tmp_path / "eager" / "last.pt"))


@gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_100_replays_wait_for_nothing_and_equal_eager(images, device, native):
    rates = [1e-3 * (1 + step % 7) for step in range(103)]
    eager = Training(images, device, captured=False, dtype="bfloat16").run(rates)
    training = Training(images, device, captured=True, dtype="bfloat16")
    captured, history = training.step, StepHistory(len(rates), 8, device)

    def step(*plan):
        torch.cuda.set_sync_debug_mode("error" if captured.replay else "default")
        try:
            results = captured(*plan)
            history.record(*results)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return results

    training.step = step
    assert_equal(training.run(rates), eager, "captured")
    assert training.reasons == []
    assert torch.equal(history.values, torch.stack(eager[0]))
