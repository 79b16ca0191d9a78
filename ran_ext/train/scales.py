"""How large the run on the embedded images is: three sizes, of which the largest that ends within ten minutes runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping

from .config import PRESETS, Config
from .progress import VALIDATION, duration

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


def run_seconds(config: Config, images: int, val_images: int, rate: float) -> float:
    """Expected duration of a run, without the test at its end.

    Args:
        config: of the run.
        images: of the training set.
        val_images: of the validation set.
        rate: images a second of its training step.

    >>> run_seconds(Config(epochs=2, batch_size=10), images=109, val_images=50, rate=5.0)
    50.0
    """
    trained = images // config.batch_size * config.batch_size
    return config.epochs * (trained + VALIDATION * val_images) / rate


def choose_scale(config: Config, seconds: Callable[[Config], float]) -> tuple[str, dict[str, float]]:
    """The largest scale that ends within ``LIMIT``, or else the smallest; and the seconds that each looked at takes.

    >>> choose_scale(PRESETS["sample"], lambda config: 100.0 * config.epochs)
    ('small', {'full': 2000.0, 'short': 800.0, 'small': 800.0})
    >>> choose_scale(PRESETS["sample"], lambda config: 30.0 * config.epochs)
    ('full', {'full': 600.0})
    """
    expected: dict[str, float] = {}
    for name, scale in SCALES.items():
        expected[name] = seconds(scale.apply(config))
        if expected[name] <= LIMIT:
            break
    return name, expected


def expected_accuracy(name: str, config: Config) -> str:
    """What the test accuracy of ``config`` should be, where it is that of the scale but for seed and dtype; else "".

    Where nothing was measured in its dtype, the figure is the other's, which the text names: in what was measured in
    both, they differ by less than seeds do.

    >>> expected_accuracy("full", dataclasses.replace(PRESETS["sample"], dtype="bfloat16", lr=0.1))
    ''
    """
    scale = SCALES[name]
    same = dataclasses.replace(scale.apply(PRESETS["sample"]), dtype=config.dtype, seed=config.seed)
    if config != same or not scale.accuracy:
        return ""
    dtype = config.dtype if config.dtype in scale.accuracy else next(iter(scale.accuracy))
    values = scale.accuracy[dtype]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} on the 512 test images (n = {len(values)}, {dtype})"


def explain_choice(name: str, expected: Mapping[str, float]) -> list[str]:
    """What the user is told of a choice of :func:`choose_scale`: the scale, the time, why, and how to get another.

    >>> print(*explain_choice("short", {"full": 1500.0, "short": 590.0}), sep="\\n")
    scale: short (8 epochs, full width), about 9:50: the largest that ends within 10 minutes here, by a few steps' time
    scale full (20 epochs, full width) would take about 25:00: ask for it by --scale full
    """
    size = f"scale: {name} ({SCALES[name]}), about {duration(expected[name])}"
    within = f"within {LIMIT / 60:.0f} minutes here, by a few steps' time"
    if expected[name] <= LIMIT:
        lines = [f"{size}: the largest that ends {within}"]
    else:
        lines = [f"{size}: the smallest, as none ends {within}"]
    if name != "full":
        full = duration(expected["full"])
        lines.append(f"scale full ({SCALES['full']}) would take about {full}: ask for it by --scale full")
    return lines
