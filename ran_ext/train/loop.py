"""The training loop's door: :func:`fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ..data import CIFAR10, Augment
from .callbacks import Callback
from .config import Config
from .distributed import Ranks, choose_device
from .dtype import resolve_dtype
from .errors import out_of_memory_explained
from .results import Result
from .run import LAST, Run
from .signals import StopRequest
from .step import Step, TrainStep


def fit(
    model: nn.Module,
    train_set: CIFAR10,
    val_set: CIFAR10 | None,
    config: Config,
    out_dir: str | Path,
    *,
    test_set: CIFAR10 | None = None,
    ranks: Ranks | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    step: str = "auto",
    make_step: Callable[[TrainStep], Step] | None = None,
    augment: Augment | None = None,
    checkpoint_every: int = 1,
    quiet: bool = False,
) -> Result:
    """Train ``model`` and leave ``last.pt`` (to resume) and ``model.pt`` (the selected weights) in ``out_dir``.

    Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint of exactly that step.

    Args:
        model: classifier of images, trained in place, on the device of ``ranks``. At the end it holds the selected
            weights, in evaluation mode. For the dense layer's penalty (``config.weight_decay_scope``) it needs a method
            ``l2_penalty()``, as the networks of :mod:`ran_ext.models` have.
        train_set: images and labels; its mean is what is subtracted from all images.
        val_set: validates each epoch. Without it nothing is selected or stopped early (``config.select`` "last",
            ``patience`` 0).
        config: the recipe; its ``model``, ``protocol`` and ``val_images`` are recorded, not acted upon.
        out_dir: made if it is missing.
        test_set: read once, at the end.
        ranks: device and place among the processes, of :func:`process_group`; by default this process alone, on CUDA
            where there is one.
        resume: continue from ``last.pt`` where there is one; on the CPU bit for bit. ``config.dtype`` "auto" is then
            the checkpoint's.
        callbacks: told of the steps, the epochs and the end, in the first process.
        step: ``eager``; ``graph``, one CUDA graph from augmentation to optimizer (:class:`CapturedStep`); ``compile``,
            the network through ``torch.compile``; or ``auto``: ``graph`` on one GPU, else ``eager``. Where the one
            asked for cannot run, the step runs eagerly, and a line says why. Each kind resumes the others' checkpoints.
        make_step: replaces the training step, given the plain one; with ``step="graph"`` it is captured too.
        augment: replaces what ``config.augment`` names.
        checkpoint_every: epochs between two checkpoints; the last epoch and an interruption always write one.
        quiet: show no progress.

    Raises:
        TrainingError: NaN, out of memory, full disk, unreadable or foreign checkpoint, in one sentence that says what
            to do. The last good checkpoint is intact.
        ValueError: the arguments do not fit together.
    """
    ranks = ranks or Ranks(0, 1, choose_device("auto"))
    _check(model, train_set, val_set, config, ranks)
    asked_dtype = config.dtype
    config = resolve_dtype(config, ranks, Path(out_dir) / LAST if resume else None)
    with StopRequest() as stop, out_of_memory_explained(ranks.device, config.batch_size):
        run = Run(
            model,
            train_set,
            val_set,
            config,
            Path(out_dir),
            ranks,
            callbacks=callbacks,
            augment=augment,
            checkpoint_every=checkpoint_every,
            asked_dtype=asked_dtype,
        )
        if resume:
            run.resume()
        run.prepare("eager" if make_step and step == "auto" else step, make_step, quiet)
        try:
            interrupted = run.train(stop)
        finally:
            run.progress.close()
        if not interrupted:
            run.select()
        test = None if interrupted or test_set is None else run.evaluate(test_set)
    result = run.result(test, interrupted)
    run.tell(lambda callback: callback.on_end(result))
    return result


def _check(model: nn.Module, train_set: CIFAR10, val_set: CIFAR10 | None, config: Config, ranks: Ranks) -> None:
    if len(train_set) < config.batch_size:
        raise ValueError(
            f"fit: train_set must hold at least one batch, got {len(train_set)} images and batch_size "
            f"{config.batch_size}; lower batch_size"
        )
    if config.batch_size % ranks.world_size:
        raise ValueError(
            f"fit: batch_size must be a multiple of the number of processes, got {config.batch_size} and "
            f"{ranks.world_size}"
        )
    if val_set is None and (config.select == "best" or config.patience):
        raise ValueError(
            "fit: without val_set there is nothing to select by or to stop early by: set select='last' and patience=0, "
            "or give validation images"
        )
    if config.weight_decay and config.weight_decay_scope == "dense" and not hasattr(model, "l2_penalty"):
        raise ValueError(
            f"fit: weight_decay_scope 'dense' needs a model with a method l2_penalty(), got {type(model).__name__}; "
            "set weight_decay_scope='all', or weight_decay=0"
        )
