"""The page's figures, each drawn on light and on dark ground."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ran_ext._attention_maps import attention_maps, depths, draw_attention, png
from ran_ext.data import CIFAR10, CLASSES
from ran_ext.train import load_model, load_normalize
from ran_ext.train.state import SELECTED

from .claims import Sample
from .outcomes import Outcome, Study
from .plan import RAN_EXT, REFERENCE, VARIANTS, Run

#: Ground and ink, the same as the page's; and a colour for each variant that is legible on both grounds.
LIGHT, DARK = ("#ffffff", "#1f2328"), ("#15181c", "#d7dce2")
COLOURS = {"base-adam": "#3b82c4", "base-nesterov": "#e07b1a", "base-nesterov-0.1": "#c94a53",
           "compact": "#2f9e62", "paper": "#b05cc6"}  # fmt: skip
#: What the styles of lines stand for, where a variant has two curves.
PARTS = {"validation": "-", "training": ":"}
#: Test images whose masks are drawn.
MASK_IMAGES = 6


def render(draw: Callable[[], Figure], dark: bool) -> bytes:
    """The PNG of a figure on one of the two grounds."""
    ground, ink = DARK if dark else LIGHT
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    style: Any = dict.fromkeys(inked, ink) | {
        "figure.facecolor": ground,
        "axes.facecolor": ground,
        "savefig.facecolor": ground,
        "legend.facecolor": ground,
        "legend.framealpha": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        return png(draw())


def curve(axis: Axes, runs: Sequence[Outcome], x: str, y: str, **look: Any) -> None:
    """Mean over the seeds, epoch by epoch, with a band of one standard deviation."""
    epochs = [[run.epochs[i] for run in runs if i < len(run.epochs)] for i in range(max(len(r.epochs) for r in runs))]
    across = [float(np.mean([row[x] for row in rows])) for rows in epochs]
    means = np.array([np.mean([row[y] for row in rows]) for rows in epochs])
    spread = np.array([np.std([row[y] for row in rows], ddof=1) if len(rows) > 1 else 0.0 for rows in epochs])
    axis.plot(across, means, **look)
    axis.fill_between(across, means - spread, means + spread, color=look["color"], alpha=0.18, linewidth=0)


def panels(figure: Figure, study: Study) -> Iterator[tuple[Axes, str]]:
    """One for each implementation that the study trains, the reference's first, on the same axes."""
    implementations = study.scale.implementations[::-1]
    shared = figure.subplots(1, len(implementations), sharex=True, sharey=True, squeeze=False)
    return zip(shared[0], implementations, strict=True)


def comparison(study: Study, variants: Sequence[str]) -> Figure:
    """Training and validation accuracy of some variants over epochs; a panel for each implementation."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, implementation in panels(figure, study):
        for variant in variants:
            draw_variant(axis, study, implementation, variant, "epoch", "accuracy")
        axis.set_title(implementation)
        finish_axis(axis, "epoch")
    figure.axes[0].set_ylabel("accuracy")
    share_legend(figure, PARTS)
    return figure


def over_time(study: Study, variants: Sequence[str]) -> Figure:
    """Validation accuracy of some variants over wall time, both implementations in one panel."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    styles = {REFERENCE: "--", RAN_EXT: "-"}
    styles = {name: styles[name] for name in reversed(study.scale.implementations)}
    for implementation, style in styles.items():
        for variant in variants:
            runs = list(study.of(implementation, variant).values())
            label = VARIANTS[variant].label if implementation == RAN_EXT else None
            look = {"color": COLOURS[variant], "linestyle": style, "label": label}
            if runs:
                curve(axis, runs, "seconds", "val_accuracy", **look)
    finish_axis(axis, "seconds")
    axis.set_ylabel("validation accuracy")
    dtypes = {REFERENCE: "float32", RAN_EXT: study.scale.dtype}
    share_legend(figure, {f"{name}, {dtypes[name]}": style for name, style in styles.items()})
    return figure


def finish_axis(axis: Axes, x: str) -> None:
    """Label and ticks of an axis of epochs or seconds, which begin at 0."""
    axis.set(xlabel="epoch" if x == "epoch" else "wall time (s)", xlim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)


def share_legend(figure: Figure, styles: Mapping[str, Any] = MappingProxyType({})) -> None:
    """One legend above all panels: what is drawn in any of them, and what the styles of lines stand for."""
    named: dict[str, Any] = {label: handle for axis in figure.axes
             for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    ink = matplotlib.rcParams["text.color"]
    named |= {label: Line2D([], [], color=ink, linestyle=style) for label, style in styles.items()}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=5, fontsize=8, frameon=False)


def draw_variant(axis: Axes, study: Study, implementation: str, variant: str, x: str, measure: str) -> None:
    """Its two curves: validation drawn through, training dotted."""
    runs = list(study.of(implementation, variant).values())
    if runs:
        curve(axis, runs, x, f"train_{measure}", color=COLOURS[variant], linestyle=":")
        curve(axis, runs, x, f"val_{measure}", color=COLOURS[variant], label=VARIANTS[variant].label)


def learning_curves(study: Study, implementation: str) -> Figure:
    """Loss and accuracy of all variants, over epochs and over seconds."""
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    for row, measure in zip(figure.subplots(2, 2, sharey="row"), ("loss", "accuracy"), strict=True):
        for axis, x in zip(row, ("epoch", "seconds"), strict=True):
            for variant in COLOURS:
                draw_variant(axis, study, implementation, variant, x, measure)
            finish_axis(axis, x)
        row[0].set_ylabel("cross entropy" if measure == "loss" else measure)
    share_legend(figure, PARTS)
    return figure


def ordering(study: Study) -> Figure:
    """Test accuracy of every variant: a dot for each seed, the mean and its 95% interval."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    markers = {REFERENCE: "s", RAN_EXT: "o"}
    for row, variant in enumerate(COLOURS):
        for implementation, offset in ((REFERENCE, -0.15), (RAN_EXT, 0.15)):
            values = tuple(run.test_accuracy for run in study.of(implementation, variant).values())
            if not values:
                continue
            colour, sample = COLOURS[variant], Sample(values)
            axis.plot(values, [row + offset] * len(values), "|", color=colour, markersize=9)
            bar = sample.half_width if len(values) > 1 else 0
            filled = colour if implementation == RAN_EXT else "none"
            axis.errorbar(sample.mean, row + offset, xerr=bar, fmt=markers[implementation], color=colour,
                          markerfacecolor=filled, capsize=3)  # fmt: skip
    axis.set_yticks(range(len(COLOURS)), [VARIANTS[variant].label for variant in COLOURS])
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy")
    axis.grid(alpha=0.25, axis="x")
    return figure


def weights(study: Study) -> Figure:
    """Histogram of the dense layer's weights, all seeds together, with and without the L2 penalty."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, implementation in panels(figure, study):
        for variant in ("compact", "base-adam"):
            runs = study.of(implementation, variant).values()
            values = [value for run in runs for row in run.last_layer for value in row]
            look: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.5, "color": COLOURS[variant], "density": True}
            if values:
                axis.hist(values, bins=60, label=VARIANTS[variant].label, **look)
        axis.set(title=implementation, xlabel="weight of the last layer")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("density")
    share_legend(figure)
    return figure


def confusion(study: Study) -> Figure:
    """Test images by class, shares of each true class, the compact network; a panel for each implementation."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axis, implementation in panels(figure, study):
        runs = study.of(implementation, "compact").values()
        counts = np.sum([run.confusion for run in runs], axis=0) if runs else np.zeros((10, 10))
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.ndindex(shares.shape):
            ink = "white" if shares[row, column] > 50 else "#1f2328"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks(range(10), CLASSES, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(10), CLASSES)
        axis.spines[:].set_visible(False)
        axis.set(title=implementation, xlabel="predicted")
    figure.axes[0].set_ylabel("true class (percent)")
    return figure


def masks(study: Study, test: CIFAR10) -> Figure:
    """Attention in ran_ext's compact network, first seed, on the first test images."""
    checkpoint = study.run_folder(Run(RAN_EXT, "compact", 0)) / SELECTED
    model, images = load_model(checkpoint), test.images[:MASK_IMAGES]
    inputs = load_normalize(checkpoint)(images)
    with torch.no_grad():
        labels = model(inputs).argmax(1).tolist()
    pairs = zip(test.labels[:MASK_IMAGES].tolist(), labels, strict=True)
    titles = [f"{CLASSES[true]}\n(predicted {CLASSES[found]})" for true, found in pairs]
    return draw_attention(images, attention_maps(model, inputs), depths(model), titles)
