"""The training loop's door: :func:`fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..data import CIFAR10
from ..data.cifar10 import require_images
from .callbacks import Callback
from .config import Config
from .distributed import Ranks, choose_device
from .dtype import resolve_dtype
from .errors import out_of_memory_explained
from .folder import run_folder
from .memory import require_memory
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
    augment: Callable[[Tensor], Tensor] | None = None,
    checkpoint_every: int = 1,
    quiet: bool = False,
) -> Result:
    """Train ``model`` and leave ``last.pt`` (to resume) and ``model.pt`` (the selected weights) in ``out_dir``.

    Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint of exactly that step. One run at a time
    writes to ``out_dir``.

    Args:
        model: classifier of images, trained in place, on the device of ``ranks``. At the end it holds the selected
            weights, in evaluation mode. Modules that come in evaluation mode inside a model in training mode are
            frozen, and stay in evaluation mode: batch normalisations keep their running statistics. For the dense
            layer's penalty (``config.weight_decay_scope``) it needs a method ``l2_penalty()``, as the networks of
            :mod:`ran_ext.models` have.
        train_set: images and labels; its mean is what is subtracted from all images.
        val_set: validates each epoch. Without it nothing is selected or stopped early (``config.select`` "last",
            ``patience`` 0).
        config: the recipe; what says how to make the model and the data sets (``model``, ``model_options``,
            ``dropout``, ``protocol``, ``val_images``) is recorded, not acted upon.
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
        augment: replaces what ``config.augment`` and ``config.cutout`` name: an :class:`~ran_ext.data.Augment` with the
            normalisation of :func:`build_normalize`, or a function of uint8 images ``(N, C, H, W)`` that returns such
            images, as torchvision's transforms v2 do; they are normalised after it.
        checkpoint_every: epochs between two checkpoints; the last epoch and an interruption always write one.
        quiet: show no progress.

    Raises:
        TrainingError: NaN, out of memory, full disk, another run in ``out_dir``, unreadable or foreign checkpoint, in
            one sentence that says what to do. The last good checkpoint is intact.
        TypeError: a data set is none, or ``augment`` returns something else.
        ValueError: the arguments do not fit together, or a setting would have no effect.
    """
    ranks = ranks or Ranks(0, 1, choose_device("auto"))
    for name, dataset in (("train_set", train_set), ("val_set", val_set), ("test_set", test_set)):
        if dataset is not None or name == "train_set":
            require_images("fit", name, dataset)
    _check(model, train_set, val_set, config, ranks)
    asked_dtype = config.dtype
    config = resolve_dtype(config, ranks, Path(out_dir) / LAST if resume else None)
    _require_effect(config, augment is not None, resume)
    if checkpoint_every < 1:
        raise ValueError(f"fit: checkpoint_every must be at least 1, got {checkpoint_every}")
    parameters = sum(p.numel() for p in model.parameters())
    require_memory(parameters, copies=3 + (config.optimizer == "adam") + (config.ema > 0), device=ranks.device)
    with (
        StopRequest() as stop,
        out_of_memory_explained(ranks.device, config.batch_size),
        run_folder(Path(out_dir), ranks) as lock,
    ):
        run = Run(
            model,
            train_set,
            val_set,
            config,
            Path(out_dir),
            ranks,
            lock,
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


def _require_effect(config: Config, own_augment: bool, resume: bool) -> None:
    """Refuse settings that were given and would do nothing; of a run that goes on, the settings are what they were."""
    if own_augment and config.cutout:
        raise ValueError(f"fit: augment takes the place of config.cutout, which must be 0, got {config.cutout}")
    defaults = Config()
    for name, reason in () if resume else config.without_effect().items():
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"fit: config.{name} has no effect where {reason}, got {getattr(config, name)}")
