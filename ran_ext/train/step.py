"""One optimisation step, and the record of what the steps of an epoch returned.

:class:`TrainStep`'s call can be captured in a CUDA graph: static shapes, every tensor on the device, no value read
back. Whatever has the same call, ``(images, labels) -> (loss, correct)``, may stand in its place
(``fit(make_step=...)``); the caller copies both results (:meth:`StepHistory.record`) before it calls again, so they may
be the same memory each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ema import ExponentialMovingAverage
from .mixing import mixup

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
    ):
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.l2, self.penalty = l2, penalty
        self.label_smoothing, self.mix, self.dtype = label_smoothing, mix, dtype
        self.highest_label = highest_label

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        share = torch.rand(len(images), device=images.device) if self.mix else None
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images if share is None else mixup(images, share)).float()
        require_classes("fit", logits, self.highest_label)
        targets = labels
        if share is not None:
            classes = torch.arange(logits.shape[1], device=labels.device)
            targets = mixup((labels[:, None] == classes).float(), share)  # F.one_hot reads the labels back on the CPU
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        objective = loss if self.penalty is None or not self.l2 else loss + self.l2 * self.penalty()
        if self.scaler is None:
            objective.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(objective).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            average, source = self.ema
            average.update(source)
        with torch.no_grad():
            predicted = logits.argmax(1, keepdim=True)
            right = predicted == labels[:, None] if share is None else targets.gather(1, predicted)
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
