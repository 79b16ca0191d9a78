"""The report's training: Adam or Nesterov SGD, learning rate steps, early stopping.

Eager, float32, NCHW, and PyTorch's own settings: on CUDA its convolutions may use TF32.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .data import Pictures, mean_image, normalise
from .networks import ResidualAttentionNetwork, ran_base, ran_compact, ran_paper

NETWORKS = {"ran_compact": ran_compact, "ran_base": ran_base, "ran_paper": ran_paper}
DEFAULT_LR = {"adam": 1e-3, "nesterov": 0.1}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training; the defaults are the report's.

    Args:
        network: ``ran_compact``, ``ran_base`` or ``ran_paper``.
        width: multiplier of its channels.
        optimizer: ``adam``, or ``nesterov`` (SGD with momentum 0.9).
        lr: None for 1e-3 (adam) or 0.1 (nesterov).
        l2: times the sum of squares of the dense layer's weight, added to the loss.
        dropout: probability before the dense layer; None for the network's own.
        epochs: at most.
        batch_size: images a step; an epoch's last step takes what is left.
        patience: stop after this many epochs without a better validation accuracy; 0 for never.
        lr_step_epochs: epochs between two divisions of the learning rate by 10.
        augment: whether pictures are turned, mirrored and shifted at random.
        workers: processes that prepare them; 0 for none beside the one that trains.
        seed: of the weights, the order, augmentation and dropout.

    Raises:
        ValueError: there is no such network or optimizer.
    """

    network: str = "ran_compact"
    width: float = 1.0
    optimizer: str = "adam"
    lr: float | None = None
    l2: float = 1e-3
    dropout: float | None = None
    epochs: int = 80
    batch_size: int = 128
    patience: int = 15
    lr_step_epochs: int = 20
    augment: bool = True
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("network", NETWORKS), ("optimizer", DEFAULT_LR)):
            if getattr(self, name) not in choices:
                raise ValueError(f"Recipe: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


@dataclasses.dataclass
class Trained:
    """What :func:`train` hands back.

    Attributes:
        network: with the weights of the last epoch.
        mean: of the training images, float32 (3, H, W), on the CPU.
        figures: of each epoch: ``epoch`` (from 1), ``train_loss`` and ``train_accuracy`` (over the batches as they were
            trained on, without the penalty), ``val_loss``, ``val_accuracy``, ``seconds`` since the start.
    """

    network: ResidualAttentionNetwork
    mean: Tensor
    figures: list[dict[str, float]]


def train(
    recipe: Recipe,
    train_images: Tensor,
    train_labels: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    device: torch.device | str,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Trained:
    """Train a network; on the CPU the same recipe gives the same weights, bit for bit.

    Args:
        recipe: its seed becomes torch's own (``torch.manual_seed``).
        train_images, val_images: uint8 (N, 3, 32, 32), on the CPU.
        train_labels, val_labels: int64 (N,), on the CPU.
        device: of the network.
        on_epoch: called with each epoch's figures.

    Raises:
        TypeError: the images are not uint8.

    >>> images, labels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10
    >>> trained = train(Recipe(width=0.125, epochs=2, batch_size=10), images, labels, images, labels, "cpu")
    >>> [figures["epoch"] for figures in trained.figures], predict(trained, images).shape
    ([1, 2], torch.Size([20, 10]))
    """
    began = time.perf_counter()
    torch.manual_seed(recipe.seed)
    trained = Trained(build_network(recipe).to(device), mean_image(train_images), [])
    optimizer = build_optimizer(trained.network, recipe)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.lr_step_epochs, gamma=0.1)
    pictures = Pictures(train_images, train_labels, trained.mean, recipe.augment)
    batches: DataLoader[Any] = DataLoader(
        pictures, recipe.batch_size, shuffle=True, num_workers=recipe.workers, persistent_workers=recipe.workers > 0
    )
    for epoch in range(1, recipe.epochs + 1):
        figures: dict[str, float] = {"epoch": epoch}
        figures["train_loss"], figures["train_accuracy"] = train_epoch(trained.network, optimizer, batches, recipe.l2)
        figures["val_loss"], figures["val_accuracy"] = validate(trained, val_images, val_labels)
        figures["seconds"] = time.perf_counter() - began
        trained.figures.append(figures)
        if on_epoch is not None:
            on_epoch(figures)
        if has_stalled([row["val_accuracy"] for row in trained.figures], recipe.patience):
            break
        schedule.step()
    return trained


def build_network(recipe: Recipe) -> ResidualAttentionNetwork:
    """The recipe's network with fresh weights, on the CPU."""
    build = NETWORKS[recipe.network]
    if recipe.dropout is None:
        return build(width=recipe.width)
    return build(width=recipe.width, dropout=recipe.dropout)


def build_optimizer(network: ResidualAttentionNetwork, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam or SGD over all parameters, without weight decay: the penalty is part of the loss."""
    lr = DEFAULT_LR[recipe.optimizer] if recipe.lr is None else recipe.lr
    if recipe.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr)
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True)


def train_step(
    network: ResidualAttentionNetwork, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, l2: float
) -> tuple[Tensor, Tensor]:
    """One step on a batch; its mean cross entropy, without the penalty, and its count of right predictions."""
    logits = network(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    (loss + l2 * network.fc.weight.square().sum()).backward()
    optimizer.step()
    return loss.detach(), (logits.argmax(1) == labels).sum()


def train_epoch(
    network: ResidualAttentionNetwork, optimizer: torch.optim.Optimizer, batches: DataLoader[Any], l2: float
) -> tuple[float, float]:
    """One pass over the pictures: mean loss and accuracy over them, each as it was trained on."""
    network.train()
    device = network.fc.weight.device
    total_loss, total_correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in batches:
        loss, correct = train_step(network, optimizer, images.to(device), labels.to(device), l2)
        # Read at the end of the epoch, so that a GPU need not wait for the CPU in each step.
        total_loss += loss * len(labels)
        total_correct += correct
        count += len(labels)
    return total_loss.item() / count, total_correct.item() / count


def validate(trained: Trained, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy and accuracy on uint8 images."""
    logits = predict(trained, images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def predict(trained: Trained, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (N, 10) of uint8 images (N, 3, 32, 32), both on the CPU, in evaluation mode.

    Raises:
        TypeError: the images are not uint8.
    """
    network = trained.network.eval()
    device = network.fc.weight.device
    return torch.cat([network(normalise(batch, trained.mean).to(device)).cpu() for batch in images.split(batch_size)])


def has_stalled(accuracies: list[float], patience: int) -> bool:
    """Whether the best of the accuracies, one an epoch, is ``patience`` epochs old; never for patience 0.

    >>> has_stalled([0.5, 0.6, 0.6], 2), has_stalled([0.5, 0.6, 0.6, 0.4], 2), has_stalled([0.5, 0.4], 0)
    (False, True, False)
    """
    return 0 < patience < len(accuracies) - accuracies.index(max(accuracies))
