"""What the page says: all of it computed from the outcomes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from . import figures
from .claims import Sample, claim_rows, parameters, show
from .outcomes import Outcome, Study
from .page import Picture, Section, Table
from .plan import RAN_EXT, REFERENCE, SCALES, VARIANTS
from .runs import Images

#: Above the claims table; and below every figure of curves.
RULE = (
    "A cell is mean ± standard deviation over the seeds. The rule of the verdicts: the seeds give a 95% interval of "
    "Student's t around the mean: reproduced, where the whole interval satisfies the claim, refuted, where none of it "
    "does; not decided otherwise, and where the two implementations disagree. The report validated on its test set: "
    "its validation accuracies are compared with accuracies on test images, which each run reads once, after its last "
    "epoch. Gaps are of the last epoch, training (augmented, in training mode) minus validation on images held out."
)
LINES = "Mean over the seeds, with a band of one standard deviation."


def picture(name: str, caption: str, draw: Callable[[], Figure]) -> Picture:
    """A figure on both grounds."""
    return Picture(name, caption, figures.render(draw, dark=False), figures.render(draw, dark=True))


def build(study: Study, images: Images) -> list[Section]:
    """The page of a study; of an unfinished one, with what there is."""
    return [
        Section("The report's experiment", [*what_ran(study), conditions(study, images)]),
        Section("The claims", [RULE, claims_table(study)]),
        Section("Test accuracy, and whether the implementations agree", agreement(study)),
        Section("Table 1: parameters", [parameters_table()]),
        Section("Figure 4: Adam against Nesterov SGD, base network", figure4(study)),
        Section("Figure 5: regularisation", figure5(study)),
        Section("Figure 6: compact against paper network", figure6(study)),
        Section("Figure 7: weights of the last layer", figure7(study)),
        Section("Learning curves", learning_curves(study)),
        Section("Confusion matrix", confusion(study)),
        Section("Attention masks", masks(study, images)),
    ]


def what_ran(study: Study) -> list[str]:
    """What the reader must know first."""
    both = "ran_ext and by a reference in plain PyTorch that shares no code with it"
    trained = both if REFERENCE in study.scale.implementations else "ran_ext alone"
    text = [
        f"Three residual attention networks on CIFAR-10, each trained by {trained}: the base network, the compact one "
        "(BN + ReLU in stem and head, dropout, L2), and the paper's (one more attention module, mask skip connections)."
    ]
    scale, full = study.scale, SCALES["full"]
    less = {
        "narrower networks": scale.width < full.width,
        "fewer images": scale.train_images is not None,
        "fewer epochs": scale.epochs < full.epochs,
    }
    if any(less.values()):
        names = ", ".join(what for what in less if less[what])
        text.append(
            f"These are smaller runs than the report's (scale {study.name}: {names}). They can show which side of a "
            "comparison wins; accuracies and times are not those of the report."
        )
    if study.missing:
        text.append(f"Not finished: {len(study.outcomes)} of {len(study.plan)} runs are there.")
    return text


def conditions(study: Study, images: Images) -> Table:
    """Scale, hardware and versions."""
    scale = study.scale
    stop = f"stopped after {scale.patience} without improvement" if scale.patience else "without early stopping"
    kinds = {RAN_EXT: f"ran_ext: {scale.dtype}, channels_last", REFERENCE: "reference: float32, NCHW"}
    counts = f"{len(images.train):,} training, {len(images.val):,} validation, {len(images.test):,} test images"
    rows = [
        ["scale", f"{study.name}: {len(study.outcomes)} of {len(study.plan)} runs, {scale.seeds} seeds"],
        ["images", f"{counts}, {'of the embedded sample' if scale.sample else 'of CIFAR-10'}, classes balanced"],
        ["networks", f"width {scale.width:g} of the report's"],
        ["training", f"batch {scale.batch_size}, {scale.epochs} epochs at most, {stop}; learning rate / 10 every "
                     f"{scale.lr_step_epochs} epochs; images turned, mirrored and shifted at random"],
        ["learning rates", "Adam 0.001; Nesterov SGD 0.01 (0.1 is tried too: see figure 4)"],
        ["implementations", "; ".join(kinds[name] for name in scale.implementations)],
    ]  # fmt: skip
    for name in ("device", "cpu", "cores", "threads", "torch", "cuda", "ran_ext", "backend", "python"):
        found = {str(outcome.environment[name]) for outcome in study.outcomes.values()}
        rows.append([name, ", ".join(sorted(found))])
    dates = sorted(outcome.environment["date"] for outcome in study.outcomes.values())
    return Table(["what ran", ""], [*rows, ["dates", f"{dates[0]} to {dates[-1]}"]])


def claims_table(study: Study) -> Table:
    """Claim, report, reference, ran_ext, verdict."""
    return Table(["figure", "claim", "report", REFERENCE, RAN_EXT, "verdict"], claim_rows(study))


def over_seeds(study: Study, implementation: str, variant: str, measure: Callable[[Outcome], float]) -> Sample | None:
    """A figure of a variant's runs."""
    values = tuple(measure(outcome) for outcome in study.of(implementation, variant).values())
    return Sample(values) if values else None


def agreement(study: Study) -> list[str | Table | Picture]:
    """Accuracies by variant and implementation, and the interval of their difference."""
    rows = []
    for variant, described in VARIANTS.items():
        runs = [study.of(implementation, variant) for implementation in (RAN_EXT, REFERENCE)]
        seeds = sorted(set.intersection(*map(set, runs)))
        cells = [show(over_seeds(study, name, variant, lambda run: run.test_accuracy)) for name in (REFERENCE, RAN_EXT)]
        apart, agree = "-", "-"
        if len(seeds) > 1:
            difference = Sample(tuple(runs[0][seed].test_accuracy - runs[1][seed].test_accuracy for seed in seeds))
            apart = f"{difference.mean:+.3f} ± {difference.half_width:.3f}"
            agree = "yes" if abs(difference.mean) <= difference.half_width else "no"
        rows.append([described.label, *cells, apart, agree])
    head = ["network, optimizer", REFERENCE, RAN_EXT, "ran_ext minus reference, 95% interval", "agree"]
    caption = "Bars: 95% intervals of the mean; strokes: the seeds. Upper, hollow: reference; lower, filled: ran_ext."
    return [Table(head, rows), picture("accuracy", caption, partial(figures.ordering, study))]


def parameters_table() -> Table:
    """Counted in both implementations at full width."""
    rows = []
    for name, said in (("ran_compact", "6.8 M"), ("ran_base", "-"), ("ran_paper", "11.5 M")):
        rows.append([name, said, *(f"{parameters(implementation, name):,}" for implementation in (REFERENCE, RAN_EXT))])
    return Table(["network", "report", REFERENCE, RAN_EXT], rows)


def figure4(study: Study) -> list[str | Table | Picture]:
    """Curves of the two optimizers, and what became of the high learning rate."""
    fast = {run: outcome for run, outcome in study.outcomes.items() if run.variant == "base-nesterov-0.1"}
    lost = [f"{run.implementation}, seed {run.seed}: {outcome.diverged}" for run, outcome in fast.items()
            if outcome.diverged]  # fmt: skip
    text = (
        "The report gives no learning rates. Adam runs at 0.001, Nesterov SGD at 0.01. At 0.1, as Wang et al. train, "
        f"{len(lost)} of {len(fast)} runs of the base network diverged"
    )
    draw = partial(figures.comparison, study, ("base-adam", "base-nesterov", "base-nesterov-0.1"))
    return [text + (f" ({'; '.join(lost)})." if lost else "."), picture("figure4", LINES, draw)]


def figure5(study: Study) -> list[str | Table | Picture]:
    """Curves and gaps of the base and the compact network."""
    rows = []
    for variant in ("base-adam", "compact"):
        gaps = [show(over_seeds(study, name, variant, lambda run: run.gap)) for name in (REFERENCE, RAN_EXT)]
        rows.append([VARIANTS[variant].label, *gaps])
    head = ["training minus validation accuracy", REFERENCE, RAN_EXT]
    draw = partial(figures.comparison, study, ("base-adam", "compact"))
    return [picture("figure5", LINES, draw), Table(head, rows)]


def figure6(study: Study) -> list[str | Table | Picture]:
    """Accuracy over time; what the times are."""
    rows = []
    for variant in ("compact", "paper"):
        for name in reversed(study.scale.implementations):
            measures: tuple[Callable[[Outcome], float], ...] = (
                lambda run: run.epoch_seconds, lambda run: run.convergence, lambda run: run.seconds
            )  # fmt: skip
            times = [show(over_seeds(study, name, variant, measure), "{:.1f}") for measure in measures]
            found = study.of(name, variant)
            count = f"{next(iter(found.values())).parameters:,}" if found else "-"
            accuracy = show(over_seeds(study, name, variant, lambda run: run.test_accuracy))
            rows.append([VARIANTS[variant].label, name, count, *times, accuracy])
    times = ["s an epoch", "s to convergence", "s in all"]
    head = ["network", "implementation", "parameters as run", *times, "test accuracy"]
    text = "Converged: the first epoch whose validation accuracy is within 0.005 of the run's best."
    draw = partial(figures.over_time, study, ("compact", "paper"))
    caption = "Validation accuracy over wall time, validation included. " + LINES
    return [picture("figure6", caption, draw), text, Table(head, rows)]


def figure7(study: Study) -> list[str | Table | Picture]:
    """Histogram."""
    caption = "The dense layer's weights after the last epoch, with the L2 penalty (compact) and without (base)."
    return [picture("figure7", caption, partial(figures.weights, study))]


def learning_curves(study: Study) -> list[str | Table | Picture]:
    """Every variant, over epochs and over seconds."""
    return [
        picture(f"curves_{name}", f"{name}. {LINES}", partial(figures.learning_curves, study, name))
        for name in reversed(study.scale.implementations)
    ]


def confusion(study: Study) -> list[str | Table | Picture]:
    """Of the compact network."""
    caption = "The compact network on the test images, all seeds together: percent of each true class."
    return [picture("confusion", caption, partial(figures.confusion, study))]


def masks(study: Study, images: Images) -> list[str | Table | Picture]:
    """Of ran_ext's compact network, where it is trained."""
    if 0 not in study.of(RAN_EXT, "compact"):
        return ["The compact network is not trained yet."]
    caption = (
        "Compact network, ran_ext, seed 0, on the first test images: magnitude of the trunk, soft mask, magnitude of "
        "their product (1 + mask) * trunk, averaged over the channels; below each map its least and its greatest value."
    )
    return [picture("masks", caption, partial(figures.masks, study, images.test))]
