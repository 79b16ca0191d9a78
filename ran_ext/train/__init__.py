"""Training on CIFAR-10, in small pieces: :func:`fit` is made of the others, and each can be used alone.

>>> from ran_ext.data import sample
>>> from ran_ext.train import Config, fit
>>> import tempfile, torch
>>> config = Config(model_options={"width": 0.125}, epochs=1, batch_size=16, patience=0, select="last")
>>> images = sample("train").subset(torch.arange(32))
>>> result = fit(config.create_model(), images, None, config, tempfile.mkdtemp(), quiet=True)
>>> len(result.figures)
1
"""

from .batches import build_augment, build_normalize, train_batches
from .callbacks import Callback
from .capture import CapturedStep, CudaGraph
from .checkpoint import load_checkpoint, load_config, load_model, load_normalize, save_checkpoint
from .config import PRESETS, Config
from .distributed import Ranks, process_group
from .dtype import resolve_dtype
from .early_stopping import EarlyStopping
from .ema import ExponentialMovingAverage
from .errors import CheckpointError, NonFiniteError, OutOfMemoryError, TrainingError
from .evaluation import Evaluation, evaluate
from .loop import fit
from .mixing import mixup
from .optimizers import build_optimizer, load_optimizer, set_lr
from .progress import Progress
from .results import EpochFigures, Result
from .schedule import learning_rate
from .state import TrainingState
from .step import Step, StepHistory, TrainStep

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
