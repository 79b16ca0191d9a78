"""Accuracies of two networks on corrupted images: table, differences with error bars, verdict, figure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ran_ext._attention_maps import png
from ran_ext._files import write_atomically
from ran_ext.data import CORRUPTIONS
from ran_ext.data.corruptions import STRENGTHS

from .student import half_width

#: The two networks (the claim: the first is more robust), and their colours.
ATTENTION, TRUNK = "attention", "trunk only"
COLOURS = {ATTENTION: "#1f5fa8", TRUNK: "#d95f02"}
ALL, LESS_CLEAN = "all corruptions", "all corruptions, less clean"
#: A difference in accuracy too small to matter.
NEGLIGIBLE = 0.005


@dataclasses.dataclass(frozen=True)
class Seed:
    """Accuracies of one trained network.

    Args:
        network: ``ATTENTION`` or ``TRUNK``.
        seed: that it was trained with.
        clean: on the images as they are.
        corrupted: by corruption, at strengths 1 to 5.
    """

    network: str
    seed: int
    clean: float
    corrupted: Mapping[str, Sequence[float]]

    def mean(self, corruption: str | None = None) -> float:
        """Over the strengths of one corruption, or over all of them."""
        names = [corruption] if corruption else list(self.corrupted)
        return statistics.mean(value for name in names for value in self.corrupted[name])


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean accuracy with attention less that without, and the half-width of its 95 % confidence interval."""

    value: float
    half_width: float

    @classmethod
    def of(cls, attention: Sequence[float], trunk: Sequence[float]) -> Difference:
        """The difference of two independent samples' means, with the smaller sample's degrees of freedom.

        >>> Difference.of([0.5, 0.7], [0.4])
        Difference(value=0.2, half_width=inf)
        """
        value = round(statistics.mean(attention) - statistics.mean(trunk), 12)
        freedom = min(len(attention), len(trunk)) - 1
        if freedom < 1:
            return cls(value, math.inf)
        error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in (attention, trunk)))
        return cls(value, half_width(error, freedom))

    @property
    def verdict(self) -> str:
        """On the claim that attention helps.

        >>> [Difference(value, 0.01).verdict for value in (0.02, 0.0, -0.02)]
        ['reproduced', 'undecided', 'refuted']
        """
        if self.value - self.half_width > 0:
            return "reproduced"
        return "refuted" if self.value + self.half_width < NEGLIGIBLE else "undecided"

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.half_width:.4f}" if math.isfinite(self.half_width) else f"{self.value:+.4f}"


def of_network(seeds: Sequence[Seed], network: str) -> list[Seed]:
    return [seed for seed in seeds if seed.network == network]


def differences(seeds: Sequence[Seed]) -> dict[str, Difference]:
    """On clean images, under each corruption (mean over its strengths), under all, and in the accuracy lost to all."""
    pair = [of_network(seeds, network) for network in (ATTENTION, TRUNK)]
    found = {"clean": Difference.of(*([seed.clean for seed in group] for group in pair))}
    for name in CORRUPTIONS:
        found[name] = Difference.of(*([seed.mean(name) for seed in group] for group in pair))
    found[ALL] = Difference.of(*([seed.mean() for seed in group] for group in pair))
    return found | {LESS_CLEAN: Difference.of(*([seed.mean() - seed.clean for seed in group] for group in pair))}


def table(seeds: Sequence[Seed]) -> str:
    """Mean accuracy and standard deviation by corruption, network and strength; then what can be compared."""
    columns = [*map(str, range(1, STRENGTHS + 1)), "mean"]
    lines = [f"| corruption | network | clean | {' | '.join(columns)} |", f"| --- | --- {'| ---: ' * 7}|"]
    for name in CORRUPTIONS:
        for network in COLOURS:
            group = of_network(seeds, network)
            if group:
                samples = [[seed.corrupted[name][level] for seed in group] for level in range(STRENGTHS)]
                samples = [[seed.clean for seed in group], *samples, [seed.mean(name) for seed in group]]
                lines.append(f"| {name} | {network} | {' | '.join(map(_mean_and_deviation, samples))} |")
    counts = [len(of_network(seeds, network)) for network in COLOURS]
    if all(counts):
        lines += ["", "| images | attention less trunk only (95 %) | attention helps: |", "| --- | ---: | --- |"]
        lines += [f"| {name} | {found} | {found.verdict} |" for name, found in differences(seeds).items()]
        lines += ["", conclusion(seeds)]
    return "\n".join(lines)


def conclusion(seeds: Sequence[Seed]) -> str:
    """One line: whether attention helps with corrupted images, and whether more than it does with clean ones."""
    found = differences(seeds)
    counts = " and ".join(str(len(of_network(seeds, network))) for network in COLOURS)
    return (
        f"Attention helps with corrupted images: {found[ALL].verdict} ({found[ALL]} in accuracy, 95 %, n = {counts}). "
        f"It helps more than with clean ones: {found[LESS_CLEAN].verdict} ({found[LESS_CLEAN]})."
    )


def draw(path: Path, seeds: Sequence[Seed], title: str) -> None:
    """A panel a corruption: mean accuracy over strength, with standard deviations; written as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # fails where matplotlib is missing, so not at import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(CORRUPTIONS), sharey=True), CORRUPTIONS, strict=True):
        for network, colour in COLOURS.items():
            group = of_network(seeds, network)
            if group:
                curves = list(zip(*([seed.clean, *seed.corrupted[name]] for seed in group), strict=True))
                means, bars = [statistics.mean(curve) for curve in curves], [_deviation(curve) for curve in curves]
                label = f"{network}, n = {len(group)}"
                axis.errorbar(range(STRENGTHS + 1), means, bars, color=colour, capsize=3, marker="o", ms=3, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("strength (0: clean)")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title)
    write_atomically(path, png(figure))


def _deviation(sample: Sequence[float]) -> float:
    return statistics.stdev(sample) if len(sample) > 1 else 0.0


def _mean_and_deviation(sample: Sequence[float]) -> str:
    deviation = f" ± {_deviation(sample):.3f}" if len(sample) > 1 else ""
    return f"{statistics.mean(sample):.3f}{deviation}"
