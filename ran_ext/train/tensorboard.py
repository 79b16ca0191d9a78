"""A run in TensorBoard: scalars a step and an epoch, the last layer's weights, attention masks."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Normalize
from .callbacks import Callback
from .masks import attention_masks, has_attention
from .results import EpochFigures, Result
from .schedule import learning_rate
from .state import TrainingState


class TensorBoardLogger(Callback):
    """Writes TensorBoard's files; a run that is resumed continues them.

    Args:
        folder: of the event files.
        images: uint8 ``(N, 3, H, W)``, a few, whose attention masks are drawn after each epoch.
        normalize: makes the network's input of them.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, images: Tensor, normalize: Normalize):
        from torch.utils.tensorboard import SummaryWriter  # fails where tensorboard is missing, so not at import

        self._open = SummaryWriter
        self.folder, self.images, self.normalize = Path(folder), images, normalize

    def on_start(self, state: TrainingState, step: int) -> None:
        self.config, self.steps = state.config, len(state.history.values)
        _silence_the_writer()
        # what an interrupted run logged after its last checkpoint comes again, so it is purged
        self.writer = self._open(str(self.folder), purge_step=step or None)

    def on_steps(self, first: int, rows: list[tuple[float, float]], images_per_second: float) -> None:
        for step, (loss, accuracy) in enumerate(rows, first):
            self.writer.add_scalar("step/loss", loss, step)
            self.writer.add_scalar("step/accuracy", accuracy, step)
            self.writer.add_scalar("step/learning_rate", learning_rate(self.config, step, self.steps), step)
        self.writer.add_scalar("step/images_per_second", images_per_second, first + len(rows) - 1)

    def on_epoch(self, figures: EpochFigures, state: TrainingState) -> None:
        step = figures.epoch * self.steps - 1
        for tag, value in (
            ("training_loss", figures.train_loss),
            ("training_accuracy", figures.train_accuracy),
            ("validation_loss", figures.val_loss),
            ("validation_accuracy", figures.val_accuracy),
            ("learning_rate", figures.lr),
            ("images_per_second", figures.images_per_second),
            ("wall_seconds", figures.seconds),
        ):
            if value is not None:
                self.writer.add_scalar(f"epoch/{tag}", value, step)
        model = state.eval_model
        dense = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if dense:
            self.writer.add_histogram("last_layer/weight", dense[-1].weight.detach().float(), step)
        device = next(model.parameters()).device
        inputs = self.normalize.to(device)(self.images.to(device))
        for name, masks in attention_masks(model, inputs).items() if has_attention(model) else ():
            self.writer.add_image(f"attention/{name}", mask_picture(self.images, masks.cpu()), step)
        self.writer.flush()

    def on_end(self, result: Result) -> None:
        self.writer.close()


def _silence_the_writer() -> None:
    """Print no traceback of TensorBoard's own thread, which gives its error to the next call as well."""
    before = threading.excepthook
    if getattr(before, "__name__", "") == "all_but_the_writer":
        return

    def all_but_the_writer(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            before(failure)

    threading.excepthook = all_but_the_writer


def mask_picture(images: Tensor, masks: Tensor, scale: int = 3) -> Tensor:
    """Images above their masks, each mask stretched to black ... white, enlarged: float ``(3, 2 H s, N W s)`` in 0..1.

    Args:
        images: uint8 ``(N, 3, H, W)``.
        masks: float ``(N, H, W)``.
        scale: of the enlargement.

    >>> mask_picture(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.rand(4, 8, 8)).shape
    torch.Size([3, 48, 96])
    """
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    stretched = ((masks - low) / (high - low).clamp_min(1e-6)).unsqueeze(1).expand(-1, 3, -1, -1)
    rows = torch.cat([images.cpu() / 255, stretched], dim=2)
    rows = F.interpolate(rows, scale_factor=float(scale), mode="nearest")
    return rows.permute(1, 2, 0, 3).flatten(2)
