"""Everything that decides what a run computes, in one frozen value that travels in checkpoints and result files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from .._errors import one_line
from ..models import ImageClassifier, create_model, list_models
from .system import require_memory

#: Fields with a closed set of values.
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "nesterov", "muon"),
    "weight_decay_scope": ("dense", "all"),
    "schedule": ("step", "onecycle", "cosine", "constant"),
    "select": ("best", "last"),
    "protocol": ("holdout", "report"),
    "augment": ("report", "light", "standard", "crop", "none"),
    "normalize": ("per_pixel", "per_channel"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
#: Fields that say what the optimizer and its schedule are.
OF_OPTIMIZER = ("optimizer", "lr", "momentum", "schedule", "lr_step_epochs", "lr_step_factor", "warmup")
DEFAULT_LR = {"adam": 1e-3, "nesterov": 0.1, "muon": 0.2}


@dataclasses.dataclass(frozen=True)
class Config:
    """A training recipe; the defaults are the report's.

    Args:
        model: a name of :func:`ran_ext.models.list_models`.
        model_options: keyword arguments of its builder, without ``dropout``.
        dropout: probability before the dense layer; None for the model's own default.
        optimizer: ``adam``, ``nesterov`` (SGD with Nesterov momentum) or ``muon`` (that, but convolutions' steps
            orthogonalized).
        lr: the highest learning rate; None for 1e-3 (adam), 0.1 (nesterov), 0.2 (muon).
        momentum: of ``nesterov`` and ``muon``; 0 for plain SGD. ``adam`` has none.
        weight_decay: of the weights in ``weight_decay_scope``.
        weight_decay_scope: ``dense`` adds ``weight_decay * sum(w**2)`` over the dense layer's weight to the loss;
            ``all`` adds ``weight_decay * w`` to the gradient of every convolution's and the dense layer's weight.
            Without a ``weight_decay`` it says nothing.
        schedule: ``step`` (times ``lr_step_factor`` every ``lr_step_epochs`` epochs), ``onecycle`` (linear rise over
            the ``warmup``, then half a cosine to 0), ``cosine`` (half a cosine to 0) or ``constant``.
        lr_step_epochs: epochs between two steps of schedule ``step``; the others have none.
        lr_step_factor: of the learning rate at each of them.
        warmup: share of the run in which ``onecycle`` rises; the others do not.
        batch_size: images a step, over all processes together.
        accumulate: parts that each process's share of a batch goes through the network in, one after the other, where
            the whole does not fit into the memory; batch statistics are then each part's own.
        epochs: at most.
        patience: stop after this many epochs without a better validation accuracy; 0 for never.
        select: which weights are tested and kept as ``model.pt``: those of the ``best`` validation accuracy, or the
            ``last``.
        protocol: ``holdout`` validates on images held out of the training set and reads the test set once, at the end;
            ``report`` validates, and so selects, on the test set, as the report did.
        val_images: held out by ``holdout``; 0 for none.
        augment: ``report`` (rotation, flip, shift), ``light`` (flip, shift by up to 2 whole pixels), ``standard``
            (likewise, up to 4), ``crop`` (of pictures in files: a random part, and flip, by torchvision) or ``none``.
        cutout: side in pixels of a square of each training image set to the mean (DeVries & Taylor 2017); 0 for none.
        mixup: train on each image mixed with another of its batch, see :func:`ran_ext.train.mixup`.
        normalize: ``per_pixel`` subtracts the training set's mean image, ``per_channel`` its channels' means, and
            divides by their standard deviations.
        label_smoothing: in [0, 1).
        test_mirror: validate and test with the logits of each image and of its mirror image averaged.
        ema: decay a step of an exponential moving average of the weights, which is then what is validated and kept;
            0 for none.
        dtype: of autocast; ``auto`` is bfloat16 where the device multiplies it (AVX512-BF16, AMX, sm_80 and up), else
            float32; ``float16`` scales the loss and needs CUDA.
        channels_last: memory format of images and weights.
        seed: of the initial weights, the order of the images, augmentation and dropout.

    Raises:
        ValueError: a value is out of its range; the text names the field.

    >>> config = Config(optimizer="nesterov", epochs=3)
    >>> Config.from_json(config.to_json()) == config
    True
    >>> config.base_lr
    0.1
    """

    model: str = "ran_compact"
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropout: float | None = None
    optimizer: str = "adam"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-3
    weight_decay_scope: str = "dense"
    schedule: str = "step"
    lr_step_epochs: int = 20
    lr_step_factor: float = 0.1
    warmup: float = 0.25
    batch_size: int = 128
    accumulate: int = 1
    epochs: int = 80
    patience: int = 15
    select: str = "best"
    protocol: str = "holdout"
    val_images: int = 5000
    augment: str = "report"
    cutout: int = 0
    mixup: bool = False
    normalize: str = "per_pixel"
    label_smoothing: float = 0.0
    test_mirror: bool = False
    ema: float = 0.0
    dtype: str = "auto"
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (CHOICES | {"model": tuple(list_models())}).items():
            value = getattr(self, name)
            _require(value in choices, name, f"one of {', '.join(choices)}", value)
        for name in ("lr_step_epochs", "batch_size", "accumulate", "epochs"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, name, "a whole number >= 1", value)
        for name in ("patience", "val_images", "cutout", "seed"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 0, name, "a whole number >= 0", value)
        for name in ("momentum", "label_smoothing", "ema", "warmup"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < 1, name, "in [0, 1)", value)
        _require(
            self.dropout is None or (_is_number(self.dropout) and 0 <= self.dropout < 1),
            "dropout",
            "in [0, 1)",
            self.dropout,
        )
        _require(self.lr is None or (_is_number(self.lr) and self.lr > 0), "lr", "positive", self.lr)
        _require(_is_number(self.weight_decay) and self.weight_decay >= 0, "weight_decay", ">= 0", self.weight_decay)
        _require(
            _is_number(self.lr_step_factor) and 0 < self.lr_step_factor <= 1,
            "lr_step_factor",
            "in (0, 1]",
            self.lr_step_factor,
        )
        for name in ("mixup", "test_mirror", "channels_last"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, "true or false", value)
        _require(not self.cutout or self.augment != "none", "cutout", "0 where augment is 'none'", self.cutout)
        _require(_is_json(self.model_options), "model_options", "a mapping of JSON's types", self.model_options)
        _require(
            "dropout" not in self.model_options,
            "model_options",
            "without dropout, which has its own field",
            self.model_options,
        )

    @property
    def base_lr(self) -> float:
        """``lr``, or the optimizer's default."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else float(self.lr)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of autocast.

        Raises:
            ValueError: ``dtype`` is ``auto``; :func:`ran_ext.train.resolve_dtype` says what that is on a device.
        """
        _require(self.dtype != "auto", "dtype", "resolved for a device (resolve_dtype) before it is used", self.dtype)
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    def create_model(self) -> ImageClassifier:
        """The network, with weights drawn from torch's global generator.

        Raises:
            ValueError: ``model_options`` do not fit the model, or it would not fit into the memory.
        """
        shapes = self.outline()
        require_memory(sum(p.numel() for p in shapes.parameters()), 1, torch.device("cpu"))
        return create_model(self.model, **self._options)

    def outline(self) -> ImageClassifier:
        """The network on the meta device, without weights: its shapes alone.

        Raises:
            ValueError: ``model_options`` do not fit the model.
        """
        try:
            with torch.device("meta"):
                return create_model(self.model, **self._options)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"Config: model_options do not fit {self.model}: {one_line(error)}") from error

    @property
    def _options(self) -> dict[str, Any]:
        return dict(self.model_options) | ({} if self.dropout is None else {"dropout": self.dropout})

    def without_effect(self) -> dict[str, str]:
        """The settings that do nothing beside the others, and why.

        >>> Config(optimizer="nesterov", schedule="cosine").without_effect()
        {'lr_step_epochs': "schedule is 'cosine'", 'lr_step_factor': "schedule is 'cosine'", 'warmup': ...}
        """
        schedule, names = f"schedule is {self.schedule!r}", list[tuple[str, str]]()
        names += [] if self.optimizer != "adam" else [("momentum", f"optimizer is {self.optimizer!r}")]
        names += [] if self.schedule == "step" else [("lr_step_epochs", schedule), ("lr_step_factor", schedule)]
        names += [] if self.schedule == "onecycle" else [("warmup", schedule)]
        return dict(names)

    def require_effect(self, own_optimizer: bool = False) -> None:
        """Raise ``ValueError`` where a setting was given (it is not the default) and would do nothing.

        Args:
            own_optimizer: whether ``fit`` is given an optimizer, which replaces the fields about it and its schedule.
        """
        defaults, idle = Config(), self.without_effect()
        if own_optimizer:
            idle |= dict.fromkeys(OF_OPTIMIZER, "fit is given an optimizer")
            _require(
                not self.weight_decay or self.weight_decay_scope == "dense",
                "weight_decay",
                "0 or of scope 'dense' where fit is given an optimizer",
                self.weight_decay,
            )
        for name, reason in idle.items():
            if getattr(self, name) != getattr(defaults, name):
                raise ValueError(f"fit: config.{name} has no effect where {reason}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, of JSON's types alone: a NumPy number would make a checkpoint that cannot be read."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.loads(json.dumps(values | {"model_options": dict(self.model_options)}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`; fields left out take their defaults.

        >>> Config.from_dict({"batchsize": 3})
        Traceback (most recent call last):
            ...
        ValueError: Config: no field named 'batchsize'; did you mean 'batch_size'?
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                raise ValueError(f"Config: no field named {name!r}; {hint}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Config: not JSON: {one_line(error)}") from error
        if not isinstance(values, dict):
            raise ValueError(f"Config: the JSON must be an object, got {type(values).__name__}")
        return cls.from_dict(values)

    def differences(self, other: Config) -> list[str]:
        """One phrase for each field in which ``other`` differs.

        >>> Config().differences(Config(seed=1))
        ['seed is 0 here and 1 there']
        """
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name} is {mine[name]!r} here and {theirs[name]!r} there" for name in mine if mine[name] != theirs[name]
        ]


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"Config: {name} must be {rule}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_json(value: object) -> bool:
    try:
        json.dumps(dict(value) if isinstance(value, Mapping) else None)
    except (TypeError, ValueError):
        return False
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


#: ``report``: the report's recipe for the full CIFAR-10. ``sample``: the embedded images on a small CPU. ``fast``: the
#: full CIFAR-10 in few epochs; one seed on a CPU, in bfloat16, reached a test accuracy of 0.866 after 6, 0.873 with
#: ``test_mirror``. ``pictures``: a folder of class folders, for which the command adapts batch and augmentation.
PRESETS: dict[str, Config] = {
    "report": Config(),
    "sample": Config(
        lr=2e-3,
        schedule="onecycle",
        batch_size=32,
        epochs=20,
        patience=0,
        select="last",
        val_images=256,
        augment="light",
        channels_last=True,
    ),
    "fast": Config(
        dropout=0.0,
        optimizer="nesterov",
        lr=0.2,
        weight_decay=5e-4,
        weight_decay_scope="all",
        schedule="onecycle",
        epochs=6,
        patience=0,
        select="last",
        val_images=0,
        augment="light",
        normalize="per_channel",
        label_smoothing=0.1,
        channels_last=True,
    ),
    "pictures": Config(
        lr=1e-3,
        weight_decay=0.0,
        schedule="onecycle",
        batch_size=32,
        epochs=20,
        patience=0,
        select="last",
        augment="crop",
        normalize="per_channel",
        channels_last=True,
    ),
}


#: Seconds within which the sample run shall end, where nobody names a scale.
LIMIT = 600.0
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of the sample run.

    Attributes:
        epochs: of the 1,792 images that are left to train on.
        width: multiplier of the network's channels.
        accuracy: by dtype, accuracies on the 512 embedded test images of runs that differ in the seed alone.
    """

    epochs: int
    width: float
    accuracy: Mapping[str, tuple[float, ...]]

    def apply(self, config: Config) -> Config:
        """``config`` at this scale."""
        options = {name: value for name, value in config.model_options.items() if name != "width"}
        width = {} if self.width == 1 else {"width": self.width}
        return dataclasses.replace(config, epochs=self.epochs, model_options=options | width)

    def __str__(self) -> str:
        width = {1.0: "full width", 0.5: "half width"}.get(self.width, f"width {self.width:g}")
        return f"{self.epochs} epochs, {width}"


#: From the largest to the smallest. The accuracies were measured on an AMD EPYC with AVX-512
#: (benchmarks/results/cpu_sample_scales.json holds the runs); with AVX2 other kernels round otherwise.
SCALES: dict[str, Scale] = {
    "full": Scale(20, 1.0, {"bfloat16": (0.55078125, 0.568359375, 0.580078125)}),
    "short": Scale(8, 1.0, {"bfloat16": (0.4921875,), "float32": (0.490234375,)}),
    "small": Scale(8, 0.5, {"bfloat16": (0.484375, 0.47265625), "float32": (0.4765625, 0.4765625, 0.5)}),
}
