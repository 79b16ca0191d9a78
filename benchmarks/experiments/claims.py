"""The report's claims as intervals, and the verdict that the runs give on each.

The rule: the seeds give a mean and a 95% interval of Student's t around it. A claim is reproduced where the whole
interval satisfies it, refuted where none of it does, and not decided otherwise; and where the two implementations come
to different verdicts, it is not decided. One seed has no interval, so it decides nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from ran_ext.models import create_model

from ..reference.training import NETWORKS
from ..student import half_width
from .outcomes import Outcome, Study
from .plan import RAN_EXT, REFERENCE

REPRODUCED, REFUTED, UNDECIDED, UNTESTED = "reproduced", "refuted", "not decided", "not tested"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One figure over the seeds.

    >>> Sample((1.0, 2.0, 3.0)).interval
    (-0.484, 4.484)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Over the seeds; NaN for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def half_width(self) -> float:
        """Of the 95% interval of the mean; infinite for one seed."""
        n = len(self.values)
        return half_width(self.std / math.sqrt(n), n - 1)

    @property
    def interval(self) -> tuple[float, float]:
        return round(self.mean - self.half_width, 3), round(self.mean + self.half_width, 3)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of the report.

    Attributes:
        figure: of the report.
        text: what is measured.
        said: the report's own figure.
        needs: the variants compared.
        measure: the figure of one seed, from their outcomes in the same order.
        low, high: the claim holds where the figure is between them.
        shown: its format.
        full_width: whether it is about the networks' full size, and untested at other scales.
        stops_early: whether it is about early stopping, and untested where there is none.
    """

    figure: str
    text: str
    said: str
    needs: tuple[str, ...]
    measure: Callable[..., float]
    low: float = -math.inf
    high: float = math.inf
    shown: str = "{:+.3f}"
    full_width: bool = False
    stops_early: bool = False

    def sample(self, study: Study, implementation: str) -> Sample | None:
        """The figure by seed; None where no seed has all variants, or the scale does not test the claim."""
        if (self.full_width and study.scale.width != 1) or (self.stops_early and not study.scale.patience):
            return None
        by_seed = [study.of(implementation, variant) for variant in self.needs]
        seeds = sorted(set.intersection(*map(set, by_seed)))
        values = tuple(self.measure(*(outcomes[seed] for outcomes in by_seed)) for seed in seeds)
        return Sample(values) if values else None

    def judge(self, sample: Sample | None) -> str:
        """The verdict of one implementation.

        >>> claim = Claim("4", "difference", "+0.25", (), max, low=0)
        >>> [claim.judge(Sample(v)) for v in ((0.2, 0.3, 0.25), (-0.2, -0.3, -0.25), (0.1, -0.1, 0.2), (0.2,))]
        ['reproduced', 'refuted', 'not decided', 'not decided']
        """
        if sample is None:
            return UNTESTED
        low, high = sample.mean - sample.half_width, sample.mean + sample.half_width
        if self.low < low and high < self.high:
            return REPRODUCED
        return REFUTED if high < self.low or self.high < low else UNDECIDED


def joint_verdict(verdicts: Sequence[str]) -> str:
    """That of all implementations, if it is the same."""
    return verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED


def parameters(implementation: str, network: str) -> int:
    """Of a network at its full width."""
    built = create_model(network) if implementation == RAN_EXT else NETWORKS[network]()
    return sum(p.numel() for p in built.parameters())


def parameters_saved(implementation: str) -> float:
    """Share of the paper network's parameters that the compact one saves."""
    return 1 - parameters(implementation, "ran_compact") / parameters(implementation, "ran_paper")


def _lead(measure: Callable[[Outcome], float]) -> Callable[[Outcome, Outcome], float]:
    return lambda one, other: measure(one) - measure(other)


CLAIMS = (
    Claim("4", "training accuracy: Adam minus Nesterov SGD, base network", "+0.25", ("base-adam", "base-nesterov"),
          _lead(lambda run: run.train_accuracy), low=0),
    Claim("4", "validation accuracy: Adam minus Nesterov SGD, base network", "+0.25", ("base-adam", "base-nesterov"),
          _lead(lambda run: run.test_accuracy), low=0),
    Claim("4", "epochs after which SGD stops early, without progress for 15", "48", ("base-nesterov",),
          lambda run: len(run.epochs), high=79.5, shown="{:.0f}", stops_early=True),
    Claim("5", "base network overfits: training minus validation accuracy", "0.039", ("base-adam",),
          lambda run: run.gap, low=0),
    Claim("5", "regularisation narrows that gap by", "a little", ("base-adam", "compact"),
          _lead(lambda run: run.gap), low=0),
    Claim("5", "validation accuracy: compact (regularised) minus base", "+0.024", ("compact", "base-adam"),
          _lead(lambda run: run.test_accuracy), low=0),
    Claim("6", "validation accuracy lost: paper minus compact network", "< 0.01", ("paper", "compact"),
          _lead(lambda run: run.test_accuracy), high=0.01),
    Claim("6", "training time saved until convergence, compact against paper network", "75%", ("compact", "paper"),
          lambda compact, paper: 1 - compact.convergence / paper.convergence, low=0.75, shown="{:.0%}"),
    Claim("6", "validation accuracy of the compact network", "0.893", ("compact",),
          lambda run: run.test_accuracy, low=0.893, shown="{:.3f}", full_width=True),
    Claim("6", "validation accuracy of the paper network", "0.90", ("paper",),
          lambda run: run.test_accuracy, low=0.90, shown="{:.3f}", full_width=True),
    Claim("6", "minutes to the compact network's convergence", "60", ("compact",),
          lambda run: run.convergence / 60, high=60, shown="{:.1f}", full_width=True),
)  # fmt: skip


def claim_rows(study: Study) -> list[list[str]]:
    """Figure, claim, the report's figure, the reference's, ran_ext's, verdict: first what training decides.

    The embedded sample is too small to decide anything.
    """
    rows = []
    for claim in CLAIMS:
        samples = {name: claim.sample(study, name) for name in (REFERENCE, RAN_EXT)}
        judged = [claim.judge(samples[name]) for name in study.scale.implementations]
        verdict = UNTESTED if study.scale.sample else joint_verdict(judged)
        cells = [show(sample, claim.shown) for sample in samples.values()]
        rows.append([claim.figure, claim.text, claim.said, *cells, verdict])
    saved = [parameters_saved(implementation) for implementation in (REFERENCE, RAN_EXT)]
    verdict = joint_verdict([REPRODUCED if round(share, 2) >= 0.40 else REFUTED for share in saved])
    text = "parameters saved, compact against paper network"
    return [*rows, ["Table 1", text, "40%", *(f"{share:.1%}" for share in saved), verdict]]


def show(sample: Sample | None, shown: str = "{:.3f}") -> str:
    """Mean, standard deviation over the seeds and their number; the spread has the format of the mean, unsigned."""
    if sample is None:
        return "-"
    spread = shown.replace("+", "").format(sample.std) if len(sample.values) > 1 else "?"
    return f"{shown.format(sample.mean)} ± {spread} (n\u00a0=\u00a0{len(sample.values)})"
