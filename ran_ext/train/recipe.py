"""The parts that a :class:`Config` names: batches, augmentation, mixup, optimizer, schedule, moving average.

Schedule, moving average and augmentation are ours, not torch's or torchvision's, because a captured step holds them:
one CUDA graph runs from the gathering of the images to the averaged weights, so none of them may read a value back to
the host or depend on a Python number. ``torch.optim.swa_utils.AveragedModel`` reads its count of updates back at every
step; torchvision's transforms draw their random numbers on the host; of torch's schedulers some change a momentum that
is a Python number, which a graph would freeze. ``fit(optimizer=..., scheduler=...)`` takes torch's own, eagerly.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._muon import Muon
from ..data import Augment, Batches, Images, Normalize, PictureFolder, split_validation
from ..data.folders import Found
from ..data.images import Labelled
from ..data.loading import LoadedBatches, some_images
from ..data.sources import Source, count_batches, count_images
from .config import Config
from .system import Ranks


def require_trainable(
    model: nn.Module, train_set: Source, val_set: Source | None, config: Config, ranks: Ranks
) -> None:
    """Raise ``ValueError`` where ``config`` does not fit the model, the images or the processes."""
    steps = count_batches(train_set, config.batch_size)
    if steps < 1:
        raise ValueError(
            f"fit: train_set must hold at least one batch, got {count_images(train_set, config.batch_size)} images and "
            f"batch_size {config.batch_size}; lower batch_size"
        )
    if any(count != steps for count in ranks.gather(steps)):
        raise ValueError(f"fit: train_set must have as many batches in each process, got {ranks.gather(steps)}")
    if config.batch_size % (ranks.world_size * config.accumulate):
        parts = f" times accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise ValueError(
            f"fit: batch_size must be a multiple of the number of processes{parts}, got {config.batch_size} and "
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


#: Share of pictures that are held out to validate, where none are.
HELD_OUT = 0.2


def fit_to_data(config: Config, found: Found, given: Collection[str], where: str) -> Config:
    """The recipe with what follows from the data, where the user has not decided otherwise.

    That is the network's outputs and channels; for pictures in files also the batch, at most a quarter of them, how
    many are held out where none are, a fifth, and ``light`` for ``crop`` where they are held in memory.

    Args:
        config: of the run.
        found: its data.
        given: fields of ``config`` that the user has decided.
        where: the data's place, for errors.

    Raises:
        ValueError: a setting contradicts the data.
    """
    train = found.train
    outline, network = config.outline(), dict(config.model_options)
    for name, got, needed, what in (
        ("num_classes", outline.fc.out_features, len(train.classes), "classes"),
        ("in_channels", outline.in_channels, len(train[0][0]), "channels of the images"),
    ):
        if got != needed and name in network:
            raise ValueError(f"--model-option {name} must be {needed}, the {what} of {where}, got {got}")
        if got != needed:
            network[name] = needed
    changes: dict[str, Any] = {}
    if found.pictures:
        held_out = 0 if found.val else max(len(train.classes), round(HELD_OUT * len(train)))
        batch = 2 ** int(math.log2(max(1, (len(train) - held_out) // 4)))
        changes = {"val_images": held_out, "batch_size": min(config.batch_size, batch)}
        if config.augment == "crop" and not isinstance(train, PictureFolder):
            changes["augment"] = "light"
    if found.val and "val_images" in given and config.val_images:
        raise ValueError(f"--val-images must be 0, got {config.val_images}: {where} has validation pictures of its own")
    if found.test is None and config.protocol == "report":
        raise ValueError(f"--protocol report validates on test pictures, and {where} has none")
    changes = {name: value for name, value in changes.items() if name not in given}
    return dataclasses.replace(config, model_options=network, **changes)


def split(found: Found, config: Config) -> tuple[Labelled, Labelled | None, Labelled | None]:
    """Training, validation and test images, as ``config.protocol`` says.

    The images held out are the same ones for every seed, so that seeds can be compared.

    Raises:
        ValueError: there are not so many images to hold out.
    """
    if config.protocol == "report":
        return found.train, found.test, found.test
    if found.val or not config.val_images:
        return found.train, found.val, found.test
    train_set, val_set = split_validation(found.train, config.val_images)
    return train_set, val_set, found.test


def build_normalize(train_set: Source, config: Config, workers: int = 0) -> Normalize | None:
    """``config.normalize``, from the training images' own statistics.

    Those of a data set or a loader are of 1,000 of its images; None where it gives floating images, which it has
    normalised itself.
    """
    build = {"per_pixel": Normalize.per_pixel, "per_channel": Normalize.per_channel}[config.normalize]
    images = some_images(train_set, workers=workers)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return None if images is None else build(images, layout)


def build_augment(config: Config, normalize: Normalize) -> Augment | Normalize:
    """``config.augment`` and ``config.cutout``; ``crop`` is made before, where pictures are read."""
    if config.augment in ("none", "crop") and not config.cutout:
        return normalize
    if config.augment == "crop":
        return Augment(normalize, rotation=0, flip=0, shift=0, cutout=config.cutout)
    if config.augment == "report":
        return Augment(normalize, cutout=config.cutout)
    crop = {"light": 2, "standard": 4}[config.augment]
    return Augment(normalize, rotation=0, shift=0, crop=crop, cutout=config.cutout)


def given_augment(augment: Callable[[Tensor], Tensor], normalize: Normalize) -> Callable[[Tensor], Tensor]:
    """The user's augmentation, followed by the normalisation that validation and test use.

    Args:
        augment: :class:`~ran_ext.data.Augment` with the same normalisation, or a function of uint8 ``(N, C, H, W)`` to
            the same, which is normalised after it.
        normalize: of all images.

    Raises:
        ValueError: the :class:`~ran_ext.data.Augment` normalises otherwise.
        TypeError (when called): the function does not return uint8.
    """
    if isinstance(augment, Augment):
        pairs = zip(augment.normalize.buffers(), normalize.buffers(), strict=True)
        if not all(torch.equal(mine.to(own.device), own) for mine, own in pairs):
            raise ValueError(
                "fit: augment must normalise as validation does: build it with build_normalize(train_set, config)"
            )
        return augment

    def normalised(images: Tensor) -> Tensor:
        augmented = augment(images)
        if not isinstance(augmented, Tensor) or augmented.dtype != torch.uint8:
            got = augmented.dtype if isinstance(augmented, Tensor) else type(augmented).__name__
            raise TypeError(
                f"fit: augment must return uint8 images, got {got}: they are normalised after it, as validation's "
                "images are, so leave conversion to float and normalisation out"
            )
        return normalize.to(images.device)(augmented)

    return normalised


def train_batches(
    train_set: Source,
    config: Config,
    ranks: Ranks,
    normalize: Normalize | None,
    augment: Callable[[Tensor], Tensor] | None = None,
    workers: int = 0,
) -> Batches | LoadedBatches:
    """The training batches, this process's share, determined by seed and epoch; a last, smaller one is left out.

    ``augment`` takes the place of ``config.augment``, as :func:`given_augment` says. A loader has its own batches.

    Raises:
        ValueError: the images are floating, so that ``normalize`` is None, and an augmentation is asked for.
    """
    if config.augment == "crop" and not augment:
        if not isinstance(train_set, PictureFolder):
            raise ValueError(f"fit: config.augment 'crop' is of a PictureFolder, got {type(train_set).__name__}")
        train_set = train_set.cropped()
    if normalize is None and (augment or config.augment != "none"):
        got = "augment" if augment else f"config.augment {config.augment!r}"
        raise ValueError(
            f"fit: an augmentation is of uint8 images, and train_set gives floating ones, got {got}: set "
            "config.augment='none', and augment in its transforms"
        )
    done: Callable[[Tensor], Tensor] | None = None
    if normalize is not None:
        done = given_augment(augment, normalize) if augment else build_augment(config, normalize)
    device, rank, size = ranks.device, ranks.rank, config.batch_size
    if isinstance(train_set, Images):
        seed = torch.Generator().manual_seed(config.seed)
        return Batches(train_set, size, done, True, seed, True, device, rank, ranks.world_size)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return LoadedBatches(train_set, size, done, config.seed, device, rank, ranks.world_size, workers, layout)


def mixup(batch: Tensor, share: Tensor) -> Tensor:
    """``share`` of each row of ``batch`` and the rest of its partner's, the row at the same place from the other end.

    Batches come in random order, so the partners are random without another draw. ``share`` uniform in [0, 1) is the
    paper's choice for CIFAR-10 (alpha = 1), here one for each row. For images and, as one-hot rows, for their labels.

    Args:
        batch: float ``(N, ...)``.
        share: float ``(N,)`` on the same device.

    >>> mixup(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0.75, 0.5, 0.25])).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    return torch.lerp(batch.flip(0), batch, share.view(-1, *[1] * (batch.dim() - 1)))


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> Optimizer:
    """Adam, Nesterov SGD or Muon over ``model``'s parameters, which must lie on ``device`` already.

    The learning rate is a tensor on the device, which the fused kernels read there, so that a captured step sees the
    changes that :func:`set_lr` makes; foreach and plain SGD would wait for the device to read it.
    The optimizer applies ``config.weight_decay`` for ``weight_decay_scope="all"`` only, to weights of two or more
    dimensions (not to biases and BN's parameters); the ``dense`` scope is part of the loss.
    Adam's eps stands outside the root; the report prints it inside, which at 1e-8 makes no measurable difference.
    Muon orthogonalizes the steps of convolutions' weights, but for those of fewer than 8 input channels, first and
    depthwise ones (Jordan et al. 2024): such a step is a quarter of the learning rate long, its momentum 0.6, its decay
    apart from it.
    """
    decay = config.weight_decay if config.weight_decay_scope == "all" else 0.0
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    lr = torch.tensor(config.base_lr, device=device)
    if config.optimizer == "muon":
        matrices = [p for p in weights if p.dim() == 4 and p.shape[1] >= 8]
        chosen = {id(p) for p in matrices}
        groups[0]["params"] = [p for p in weights if id(p) not in chosen]
        parts = [{"params": matrices, "weight_decay": decay, "orthogonal": True}]
        parts += [{**group, "orthogonal": False} for group in groups]
        bfloat16 = config.torch_dtype == torch.bfloat16
        return Muon([part for part in parts if part["params"]], lr, config.momentum, bfloat16)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=device.type == "cuda")
    sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
    if config.momentum > 0:
        # The first step would make them; but if a GradScaler skips that step, the fused kernel leaves them unwritten.
        for parameter in [*weights, *others]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimisation step ``step`` (from 0) of a run of ``config.epochs`` epochs.

    >>> [learning_rate(Config(), 100 * epoch, 100) for epoch in (0, 19, 20)]
    [0.001, 0.001, 0.0001]
    >>> cycle = Config(schedule="onecycle", lr=1.0, epochs=4, warmup=0.25)
    >>> [round(learning_rate(cycle, step, 4), 3) for step in (0, 3, 4, 10, 15)]
    [0.25, 1.0, 1.0, 0.5, 0.017]
    """
    if config.schedule == "constant":
        return config.base_lr
    if config.schedule == "step":
        # decimal exponents are exact, repeated products are not: 1e-3 * 0.1 is 0.00010000000000000002
        return float(
            f"{config.base_lr * config.lr_step_factor ** (step // steps_per_epoch // config.lr_step_epochs):.12g}"
        )
    steps = config.epochs * steps_per_epoch
    rise = round(config.warmup * steps) if config.schedule == "onecycle" else 0
    if step < rise:
        return config.base_lr * (step + 1) / rise
    return config.base_lr * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


class ExponentialMovingAverage:
    """Keeps ``average``, a copy of ``model`` whose parameters follow ``decay * average + (1 - decay) * parameter``.

    Buffers (BN's running statistics, themselves averages) are copied. The decay grows from 0.1 to ``decay`` as
    ``(1 + step) / (10 + step)``, so that the random initial weights are soon forgotten; the step is counted on the
    device, and an update needs no synchronisation.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> ema = ExponentialMovingAverage(model, decay=0.5)
    >>> _ = nn.init.ones_(model.weight)
    >>> ema.update(model)
    >>> round(ema.average.weight.item(), 4)
    0.9
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Blend in ``model``'s parameters after an optimisation step."""
        keep = ((1 + self.steps) / (10 + self.steps)).clamp_(max=self.decay)
        self.steps += 1
        average: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(model.parameters())
        change = list(torch._foreach_sub(current, average))
        torch._foreach_mul_(change, 1 - keep)  # not lerp: its scalar weight would be read back from the device
        torch._foreach_add_(average, change)
        for mine, theirs in zip(self.average.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
