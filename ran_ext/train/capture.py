"""A step as one CUDA graph: a few real steps, a capture, then replays.

Nothing has to be undone: the steps of the warm-up are steps of the training, and a capture records without running.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

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

    They are looked for before the capture, since torch does not recover wholly from one that breaks.
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
