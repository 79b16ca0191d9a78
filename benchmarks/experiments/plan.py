"""Which networks are trained, at which scale, by which seeds: what decides every figure of the page."""

from __future__ import annotations

import dataclasses
from typing import Any

from ran_ext.train import Config

from ..reference.training import Recipe

#: The two implementations, by the names they have on the page.
RAN_EXT, REFERENCE = "ran_ext", "reference"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network of Table 1 with its optimizer.

    Attributes:
        label: on the page.
        model: in ran_ext and in the reference.
        optimizer: ``adam`` or ``nesterov``.
        lr: the highest learning rate; None for the optimizer's default.
        l2: penalty of the dense layer's weight; Table 1 gives it to the compact network alone.
        work: training time of an image, compact = 1; from the FLOPs of a step, 2.78 and 4.15 GFLOP an image.
    """

    label: str
    model: str
    optimizer: str
    lr: float | None = None
    l2: float = 0.0
    work: float = 1.0


#: The report gives no learning rate. Wang et al. train with 0.1, at which the base network, whose features reach the
#: dense layer without normalisation, diverges; 0.01 is the default of Keras, which the report's authors used.
VARIANTS = {
    "base-adam": Variant("base, Adam", "ran_base", "adam"),
    "base-nesterov": Variant("base, Nesterov SGD", "ran_base", "nesterov", lr=0.01),
    "base-nesterov-0.1": Variant("base, Nesterov SGD, lr 0.1", "ran_base", "nesterov", lr=0.1),
    "compact": Variant("compact, Adam", "ran_compact", "adam", l2=1e-3),
    "paper": Variant("paper, Adam", "ran_paper", "adam", work=1.49),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the runs are.

    Attributes:
        seeds: how many, from 0.
        epochs: at most.
        lr_step_epochs: epochs between two divisions of the learning rate by 10.
        patience: epochs without a better validation accuracy that end a run; 0 for never.
        width: multiplier of the networks' channels.
        batch_size: images a step.
        train_images, test_images: as many of each class; None for all.
        val_images: held out of the training set.
        workers: processes that prepare the reference's pictures.
        sample: whether the images are those embedded in the package.
        dtype: of ran_ext's networks; the reference knows float32 alone.
        implementations: that are trained.
    """

    seeds: int
    epochs: int
    lr_step_epochs: int
    patience: int
    width: float
    batch_size: int
    train_images: int | None
    val_images: int
    test_images: int | None
    workers: int = 0
    sample: bool = False
    dtype: str = "float32"
    implementations: tuple[str, ...] = (RAN_EXT, REFERENCE)


#: ``subset`` and ``short`` end where the report's SGD did, in the third learning rate: 18 epochs to a step of 7, and 12
#: to one of 5, as 48 to 20.
SCALES = {
    "full": Scale(3, 80, 20, 15, 1.0, 128, None, 5000, None, workers=8),
    "short": Scale(1, 12, 5, 0, 1.0, 128, None, 5000, None, implementations=(RAN_EXT,)),
    "subset": Scale(5, 18, 7, 0, 0.25, 64, 2560, 1000, 5000),
    "smoke": Scale(2, 2, 1, 0, 0.125, 64, 128, 60, 60, sample=True),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    >>> Run(RAN_EXT, "compact", 0).name
    'ran_ext-compact-seed0'
    """

    implementation: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.implementation}-{self.variant}-seed{self.seed}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.implementation}: {VARIANTS[self.variant].label}, seed {self.seed}"

    def config(self, scale: Scale) -> Config:
        """Of ran_ext: the report's recipe, in the scale's dtype and channels_last, the last epoch's weights kept."""
        variant = VARIANTS[self.variant]
        return Config(
            model=variant.model,
            model_options={"width": scale.width},
            optimizer=variant.optimizer,
            lr=variant.lr,
            weight_decay=variant.l2,
            lr_step_epochs=scale.lr_step_epochs,
            batch_size=scale.batch_size,
            epochs=scale.epochs,
            patience=scale.patience,
            select="last",
            val_images=scale.val_images,
            dtype=scale.dtype,
            channels_last=True,
            seed=self.seed,
        )

    def recipe(self, scale: Scale) -> Recipe:
        """The same for the reference, which has only float32 and NCHW."""
        variant = VARIANTS[self.variant]
        return Recipe(
            network=variant.model,
            width=scale.width,
            optimizer=variant.optimizer,
            lr=variant.lr,
            l2=variant.l2,
            epochs=scale.epochs,
            batch_size=scale.batch_size,
            patience=scale.patience,
            lr_step_epochs=scale.lr_step_epochs,
            workers=scale.workers,
            seed=self.seed,
        )

    def settings(self, scale: Scale) -> dict[str, Any]:
        """Everything that decides what the run computes, fit for JSON."""
        images = {name: getattr(scale, name) for name in ("train_images", "val_images", "test_images", "sample")}
        ours = self.implementation == RAN_EXT
        recipe = self.config(scale).to_dict() if ours else dataclasses.asdict(self.recipe(scale))
        return dataclasses.asdict(self) | {"images": images, "recipe": recipe}


def plan(scale: Scale) -> list[Run]:
    """All runs, seed after seed, so that an interrupted plan has every comparison, with fewer seeds.

    >>> [run.name for run in plan(SCALES["smoke"])][:3]
    ['ran_ext-base-adam-seed0', 'reference-base-adam-seed0', 'ran_ext-base-nesterov-seed0']
    """
    return [
        Run(implementation, variant, seed)
        for seed in range(scale.seeds)
        for variant in VARIANTS
        for implementation in scale.implementations
    ]
