"""Training on CIFAR-10, in small pieces: :func:`fit` is made of the others, and each can be used alone.

Each file may import those above it: ``system`` (device, processes, errors), ``config`` (the recipe as a value),
``recipe`` (its parts), ``step`` (one training step), ``evaluation`` (accuracy), ``checkpoint``,
``state`` (what a run remembers), ``report`` (what it shows), ``loop`` (:func:`fit`), ``arguments`` and ``cli``.

>>> from ran_ext.data import sample
>>> from ran_ext.train import Config, fit
>>> import tempfile, torch
>>> config = Config(model_options={"width": 0.125}, epochs=1, batch_size=16, patience=0, select="last")
>>> images = sample("train").subset(torch.arange(32))
>>> result = fit(config.create_model(), images, None, config, tempfile.mkdtemp(), quiet=True)
>>> len(result.figures)
1
"""

from .._optimizers import load_optimizer, set_lr
from .checkpoint import load_checkpoint, load_classes, load_config, load_model, load_normalize, save_checkpoint
from .config import PRESETS, Config
from .evaluation import EarlyStopping, EpochFigures, Evaluation, Result, evaluate
from .loop import fit
from .recipe import (
    ExponentialMovingAverage,
    build_augment,
    build_normalize,
    build_optimizer,
    learning_rate,
    mixup,
    train_batches,
)
from .report import Progress
from .state import Callback, TrainingState, resolve_dtype
from .step import CapturedStep, CudaGraph, Step, StepHistory, TrainStep
from .system import CheckpointError, NonFiniteError, OutOfMemoryError, Ranks, TrainingError, process_group

__all__ = [
    "PRESETS",
    "Callback",
    "CapturedStep",
    "CheckpointError",
    "Config",
    "CudaGraph",
    "EarlyStopping",
    "EpochFigures",
    "Evaluation",
    "ExponentialMovingAverage",
    "NonFiniteError",
    "OutOfMemoryError",
    "Progress",
    "Ranks",
    "Result",
    "Step",
    "StepHistory",
    "TrainStep",
    "TrainingError",
    "TrainingState",
    "build_augment",
    "build_normalize",
    "build_optimizer",
    "evaluate",
    "fit",
    "learning_rate",
    "load_checkpoint",
    "load_classes",
    "load_config",
    "load_model",
    "load_normalize",
    "load_optimizer",
    "mixup",
    "process_group",
    "resolve_dtype",
    "save_checkpoint",
    "set_lr",
    "train_batches",
]
