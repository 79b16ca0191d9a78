"""One optimisation step: :class:`TrainStep`, its kinds (eager, compiled, captured), and the record of an epoch's steps.

:class:`TrainStep`'s call can be captured in a CUDA graph: static shapes, every tensor on the device, no value read
back. Whatever has the same call, ``(images, labels) -> (loss, correct)``, may stand in its place
(``fit(make_step=...)``); the caller copies both results (:meth:`StepHistory.record`) before it calls again, so they may
be the same memory each time.

:class:`CapturedStep` is a step as one CUDA graph: a few real steps, a capture, then replays. Nothing has to be undone:
the steps of the warm-up are steps of the training, and a capture records without running.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._lower_weights import LowerWeights
from .recipe import ExponentialMovingAverage, mixup
from .system import Ranks

#: What :func:`ran_ext.train.fit` calls once a batch.
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def require_classes(who: str, logits: Tensor, highest: int) -> int:
    """The number of classes of ``logits``, which must be ``(N, classes)`` and have one for the label ``highest``.

    On a GPU a label out of range would end the process's use of the device.

    >>> require_classes("evaluate", torch.zeros(4, 3), 9)
    Traceback (most recent call last):
        ...
    ValueError: evaluate: the model must return logits (N, classes) with a class for each label up to 9, got [4, 3]
    """
    if logits.dim() != 2 or logits.shape[1] <= highest:
        raise ValueError(
            f"{who}: the model must return logits (N, classes) with a class for each label up to {highest}, got "
            f"{list(logits.shape)}"
        )
    return logits.shape[1]


class TrainStep:
    """Forward, loss, backward, optimizer, moving average, for one batch.

    Args:
        model: called on the images; in training mode while steps are taken; may be wrapped or compiled.
        optimizer: over ``model``'s parameters.
        l2: weight of ``penalty()``, added to the cross entropy.
        penalty: a scalar to keep small, such as ``model.l2_penalty``.
        label_smoothing: of the cross entropy.
        mix: train on images mixed by :func:`ran_ext.train.mixup`.
        dtype: of autocast; float32 for none.
        scaler: of the loss, for float16.
        ema: updated with ``source`` after the optimizer.
        highest_label: of all batches; the model must have an output for it.
        accumulate: parts of the batch that go through the model one after the other, their gradients added, as large
            batches must where memory is short. Batch statistics are each part's own.

    Returns (the call):
        The batch's mean cross entropy, without the penalty, and its count of right predictions (of a mixed image, the
        share that the predicted class has in it): float32 scalars on the device.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    >>> step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> images, labels = torch.ones(4, 3, 2, 2), torch.tensor([1, 1, 1, 1])
    >>> losses = [step(images, labels)[0].item() for _ in range(3)]
    >>> losses[2] < losses[0]
    True
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        l2: float = 0.0,
        penalty: Callable[[], Tensor] | None = None,
        label_smoothing: float = 0.0,
        mix: bool = False,
        dtype: torch.dtype = torch.float32,
        scaler: torch.amp.GradScaler | None = None,
        ema: tuple[ExponentialMovingAverage, nn.Module] | None = None,
        highest_label: int = 0,
        accumulate: int = 1,
    ):
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.l2, self.penalty = l2, penalty
        self.label_smoothing, self.mix, self.dtype = label_smoothing, mix, dtype
        self.highest_label, self.accumulate = highest_label, accumulate

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        share = torch.rand(len(images), device=images.device) if self.mix else None
        images = images if share is None else mixup(images, share)
        losses, rights, first = list[Tensor](), list[Tensor](), 0
        for part in images.chunk(self.accumulate):
            last = first + len(part) == len(images)
            with nullcontext() if last else getattr(self.model, "no_sync", nullcontext)():
                loss, right = self._backward(part, labels, share, first, last)
            losses.append(loss)
            rights.append(right)
            first += len(part)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            average, source = self.ema
            average.update(source)
        return reduce(torch.add, losses), reduce(torch.add, rights)

    def _backward(
        self, images: Tensor, labels: Tensor, share: Tensor | None, first: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of a part of the batch, images ``first`` and on; its share of the loss, and what is right.

        The penalty is added in the last part.
        """
        mine, parted = slice(first, first + len(images)), len(images) < len(labels)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images).float()
        require_classes("fit", logits, self.highest_label)
        targets = labels
        if share is not None:
            classes = torch.arange(logits.shape[1], device=labels.device)
            targets = mixup((labels[:, None] == classes).float(), share)  # F.one_hot reads the labels back on the CPU
        targets = targets[mine] if parted else targets
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        loss = loss * (len(images) / len(labels)) if parted else loss
        objective = loss if self.penalty is None or not self.l2 or not last else loss + self.l2 * self.penalty()
        (objective if self.scaler is None else self.scaler.scale(objective)).backward()
        if isinstance(self.model, LowerWeights):
            self.model.add_gradients()
        with torch.no_grad():
            predicted = logits.argmax(1, keepdim=True)
            right = predicted == targets[:, None] if share is None else targets.gather(1, predicted)
            return loss.detach(), right.sum(dtype=torch.float32)


class StepHistory:
    """Loss and right predictions of every step of an epoch, kept on the device and read back only when asked.

    Args:
        steps: steps of the epoch.
        batch_size: images a step.

    >>> history = StepHistory(steps=3, batch_size=4, device="cpu")
    >>> history.record(torch.tensor(2.0), torch.tensor(1.0))
    >>> history.record(torch.tensor(1.0), torch.tensor(3.0))
    >>> history.mean()
    (1.5, 0.5)
    """

    def __init__(self, steps: int, batch_size: int, device: torch.device | str):
        self.values = torch.zeros(steps, 2, device=device)
        self.batch_size = batch_size
        self.count = 0

    def record(self, loss: Tensor, correct: Tensor) -> None:
        """Copy one step's results; nothing is read back."""
        self.values[self.count, 0] = loss
        self.values[self.count, 1] = correct
        self.count += 1

    def read(self, start: int = 0) -> list[tuple[float, float]]:
        """Loss and accuracy of each step from ``start`` on: one synchronisation for all of them."""
        rows = self.values[start : self.count].tolist()
        return [(loss, correct / self.batch_size) for loss, correct in rows]

    def mean(self) -> tuple[float, float]:
        """Mean loss and accuracy of the steps so far."""
        loss, correct = self.values[: self.count].cpu().double().mean(0).tolist()  # not every device has float64
        return loss, correct / self.batch_size


#: ``auto`` picks one of the others; ``graph`` is one CUDA graph, ``compile`` the network through ``torch.compile``.
STEPS = ("auto", "eager", "graph", "compile")


def choose_step(asked: str, ranks: Ranks, own_optimizer: bool = False) -> tuple[str, str]:
    """The kind of step that runs and, where it is not the one asked for, why.

    With an optimizer of the user's (``own_optimizer``) no step is captured: a graph would freeze its Python numbers.

    Raises:
        ValueError: ``asked`` is none of ``STEPS``.

    >>> choose_step("auto", Ranks(0, 1, torch.device("cpu")))
    ('eager', '')
    >>> choose_step("graph", Ranks(0, 2, torch.device("cpu")))
    ('eager', 'the 2 processes exchange statistics and gradients within the step')
    """
    if asked not in STEPS:
        raise ValueError(f"fit: step must be one of {', '.join(STEPS)}, got {asked!r}")
    if asked == "auto":
        alone = ranks.world_size == 1 and ranks.device.type == "cuda"
        return "graph" if alone and not own_optimizer else "eager", ""
    if asked != "eager" and ranks.world_size > 1:
        return "eager", f"the {ranks.world_size} processes exchange statistics and gradients within the step"
    if asked == "graph" and own_optimizer:
        return "eager", "a CUDA graph would freeze the numbers that the given optimizer and scheduler change"
    return asked, ""


class CompiledModel:
    """``torch.compile(model)``, or ``model`` itself where it cannot be compiled.

    ``fullgraph``, so that what cannot be compiled is found before anything has run.

    Args:
        model: called on the images.
        on_fallback: told why the model runs eagerly.
    """

    def __init__(self, model: nn.Module, on_fallback: Callable[[str], None]):
        self.model, self.on_fallback = model, on_fallback
        self.call: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True)

    def __call__(self, images: Tensor) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException  # seconds to import

        try:
            return self.call(images)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            self.on_fallback(f"torch.compile failed: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}")
            self.call = self.model
            return self.call(images)


T = TypeVar("T")


class CapturedStep(Generic[T]):
    """``function``, launched as one CUDA graph from its call ``warm_up`` + 1 on.

    The first calls run eagerly: libraries choose their kernels, the optimizer makes its state. If the last of them
    waits for the device, or the capture fails, or there is no CUDA, every later call runs eagerly too. So does a call
    whose arguments have other shapes, such as an epoch's smaller last batch.

    A replay launches the captured call's kernels on the same memory. It sees its arguments, which are copied there;
    what was changed in place, such as a learning rate that is a tensor; and new random numbers of the device's default
    generator, those that an eager call would draw. It sees no Python number, no branch, and no tensor that took the
    place of another: :func:`load_optimizer` loads an optimizer's state into the tensors that are there.

    Args:
        function: of one tensor or more, on the device; it must not wait for the device.
        warm_up: eager calls before the capture, at least 1.
        on_fallback: told why the calls run eagerly.
        graph: warms up and captures; a :class:`CudaGraph` by default.

    Returns (the call):
        What ``function`` returns, in the same memory each time: copy what must outlive the next call.

    Raises:
        ValueError: ``warm_up`` is less than 1.

    >>> from ran_ext.train import Config, TrainStep, build_optimizer, set_lr
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    >>> optimizer = build_optimizer(model.to(device), Config(), device)
    >>> step = CapturedStep(TrainStep(model, optimizer), on_fallback=lambda reason: None)
    >>> images, labels = torch.ones(4, 3, 2, 2, device=device), torch.ones(4, dtype=torch.int64, device=device)
    >>> losses = []
    >>> for lr in (0.1, 0.1, 0.1, 0.01, 0.001):
    ...     set_lr(optimizer, lr)
    ...     losses.append(step(images, labels)[0].clone())
    >>> (losses[4] < losses[0]).item()
    True
    """

    def __init__(
        self,
        function: Callable[..., T],
        *,
        warm_up: int = 3,
        on_fallback: Callable[[str], None] = warnings.warn,
        graph: CudaGraph | None = None,
    ):
        if warm_up < 1:
            raise ValueError(f"CapturedStep: warm_up must be at least 1, got {warm_up}")
        self.function, self.on_fallback, self.graph = function, on_fallback, graph
        self.warm_up_left, self.eager = warm_up, False
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], T] | None = None

    def __call__(self, *inputs: Tensor) -> T:
        if not self.inputs:
            self._begin(inputs)
        if self.eager or any(mine.shape != given.shape for mine, given in zip(self.inputs, inputs, strict=True)):
            return self.function(*inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self._warm_up() if self.replay is None else self.replay()

    def _begin(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        device = inputs[0].device
        if self.graph is None and device.type == "cuda":
            self.graph = CudaGraph(device)
        if self.graph is None:
            self._fall_back(f"a CUDA graph needs a CUDA GPU, and this runs on {device}")

    def _warm_up(self) -> T:
        assert self.graph is not None
        result, waits = self.graph.warm_up(self._run)
        self.warm_up_left -= 1
        if self.warm_up_left == 0 and waits:
            self._fall_back(f"no CUDA graph can hold a step that waits for the device, as this one does at {waits[0]}")
        elif self.warm_up_left == 0:
            try:
                self.replay = self.graph.capture(self._run)
            except RuntimeError as error:
                self._fall_back(f"the capture in a CUDA graph failed: {error}")
        return result

    def _run(self) -> T:
        return self.function(*self.inputs)

    def _fall_back(self, reason: str) -> None:
        self.eager = True
        self.on_fallback(reason)


class CudaGraph:
    """Warms up and captures on a side stream of ``device``, by default the current one."""

    def __init__(self, device: torch.device | None = None):
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], T]) -> tuple[T, list[str]]:
        """Run ``function``: what it returns, and the lines at which it waited for the device."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _waits() as lines:
            result = function()
        current.wait_stream(self.stream)
        return result, lines

    def capture(self, function: Callable[[], T]) -> Callable[[], T]:
        """Record ``function`` without running it; the call that launches it, and returns the same memory each time.

        Raises:
            RuntimeError: ``function`` does what no capture allows; the text is that of the first error.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # the outer context leaves the stream also where the inner one fails to, as it does after an error
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
                result = function()
        except RuntimeError as error:
            self._renew_generator()
            first: BaseException = error
            while first.__context__ is not None:  # ending a broken capture raises too, with less to say
                first = first.__context__
            raise RuntimeError(str(first).partition("\n")[0]) from error

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def _renew_generator(self) -> None:
        """A capture that breaks leaves the default generator expecting more of it, and the next dropout would fail."""
        generator = torch.cuda.default_generators[self.stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Collects the lines of Python that wait for the device while it is entered.

    They are found before the capture, because torch does not fully recover from a capture that fails.
    """
    lines: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if str(warning.message).startswith("called a synchronizing CUDA operation"):
            lines.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
