"""``ran-ext-train``: train one of the networks on pictures in folders, CIFAR-10 or CIFAR-100.

The run on the embedded images comes in three sizes (:data:`~ran_ext.train.config.SCALES`); a few steps, timed here, say
which is the largest that ends within ten minutes. The run that follows is the same bit for bit without them.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._command import log_to_terminal
from .._errors import one_line
from ..data import CIFAR10, DatasetError, Normalize, open_data
from ..data.folders import Found
from ..data.images import Labelled
from ..data.loading import some_images
from .arguments import RUN_FILE, SAMPLE, Options, parse, require_no_run, run_file
from .config import AUTO, LIMIT, PRESETS, SCALES, Config
from .evaluation import Result
from .loop import Run, fit
from .recipe import build_normalize, fit_to_data, split
from .report import (
    PROTOCOLS,
    VALIDATION,
    TensorBoardLogger,
    result_dict,
    say,
    table,
    write_curves,
    write_result,
)
from .state import LAST, Callback, TrainingState, resolve_dtype, run_normalize
from .system import (
    Ranks,
    TrainingError,
    duration,
    environment,
    keep_freed_memory,
    out_of_memory_explained,
    process_group,
    run_folder,
)

#: Test images whose attention masks TensorBoard shows.
MASK_IMAGES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 after an error, 130 after an interruption."""
    log_to_terminal()
    keep_freed_memory()
    try:
        options = parse(argv)
        with process_group(options.device) as ranks:
            return train(options, ranks)
    except (TrainingError, DatasetError, ValueError) as error:
        print(f"ran-ext-train: error: {one_line(error, most=2000)}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        print(f"ran-ext-train: error: {where}{error.strerror or one_line(error)}; check the path", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ran-ext-train: interrupted", file=sys.stderr)
        return 130


def train(options: Options, ranks: Ranks) -> int:
    """Train as ``options`` say; the exit status."""
    options = dataclasses.replace(options, out=ranks.gather(options.out)[0])  # its default depends on the clock
    found = find_data(options.data, options.image_size, options.skip_broken)
    config = fit_to_data(options.config, found, options.given, options.data)
    options = dataclasses.replace(options, config=config)
    train_set, val_set, test_set = split(found, config)
    torch.backends.cudnn.benchmark = True
    options = fit_to_machine(options, train_set, val_set, ranks)
    config, last = options.config, options.out / LAST if options.resume else None
    resolved = resolve_dtype(config, ranks, last)
    torch.manual_seed(config.seed)
    model = config.create_model()
    data = {
        "source": options.data,
        "training": len(train_set),
        "validation": len(val_set) if val_set else 0,
        "test": len(test_set) if test_set else 0,
        "images": list(train_set[0][0].shape),
        "classes": list(found.train.classes),
        "skipped": list(found.skipped),
    }
    normalize = run_normalize(train_set, config, last, options.workers)
    record = Record(options, resolved, data, found.remarks, ranks)
    shown = test_set or val_set or train_set
    result = fit(
        model,
        train_set,
        val_set,
        config,
        options.out,
        test_set=test_set,
        ranks=ranks,
        resume=options.resume,
        callbacks=[record, *loggers(options, shown, normalize)] if ranks.first else (),
        normalize=normalize,
        workers=options.workers,
        step=options.step,
        checkpoint_every=options.checkpoint_every,
        quiet=options.quiet,
    )
    return 130 if result.interrupted else 0


def fit_to_machine(options: Options, train_set: Labelled, val_set: Labelled | None, ranks: Ranks) -> Options:
    """``options`` with a scale in the place of ``auto``, and a word about it; every process must call it."""
    scale, config = options.scale, options.config
    if not scale:
        return options
    loud = ranks.first and not options.quiet
    if scale == AUTO:
        if loud:
            say("scale: timing a few steps to find the one that fits this machine")
        scale, expected = fitting_scale(resolve_dtype(config, ranks), train_set, val_set, ranks)
        config = SCALES[scale].apply(config)
        if loud:
            say("\n".join(explain_choice(scale, expected)))
    accuracy = expected_accuracy(scale, resolve_dtype(config, ranks))
    if loud and accuracy:
        say(f"expected test accuracy: {accuracy}")
    return dataclasses.replace(options, config=config, scale=scale)


def find_data(source: str, size: int | None = None, skip_broken: bool = False) -> Found:
    """The images of ``sample`` or a folder, as :func:`ran_ext.data.open_data` finds them.

    Raises:
        DatasetError: files are missing or damaged.
        ValueError: they are no pictures in files, and an option is of such.
    """
    if source != SAMPLE:
        return open_data(source, size, skip_broken)
    if size or skip_broken:
        raise ValueError("--image-size and --skip-broken are for folders of pictures, not for the embedded images")
    return Found(CIFAR10.sample("train"), None, CIFAR10.sample("test"))


def load_data(source: str, config: Config) -> tuple[Any, Any, Any]:
    """Training, validation and test images of ``sample`` or a folder, as :func:`split` divides them."""
    return split(find_data(source), config)


def loggers(options: Options, shown: Labelled, normalize: Normalize | None) -> list[Callback]:
    """TensorBoard, where it is wanted and installed; ``shown``: whose first images' masks it shows."""
    few = some_images(shown.subset(torch.arange(min(MASK_IMAGES, len(shown)))))
    if not options.tensorboard or normalize is None or few is None:
        return []
    try:
        return [TensorBoardLogger(options.out / "tensorboard", few.images, normalize)]
    except ImportError:
        print("no TensorBoard files: pip install tensorboard", file=sys.stderr)
        return []


class Record(Callback):
    """What the command writes and prints when training begins and ends.

    ``config`` is the recipe on this machine: its dtype is resolved, not ``auto``.
    """

    def __init__(self, options: Options, config: Config, data: Mapping[str, Any], remarks: Sequence[str], ranks: Ranks):
        self.options, self.config, self.data, self.remarks, self.ranks = options, config, data, remarks, ranks

    def on_start(self, state: TrainingState, step: int) -> None:
        """Write ``run.json``, now that everything is accepted, and say what is about to happen."""
        options, data = self.options, self.data
        require_no_run(options.out, options.resume)  # another run may have ended since the flags were read
        self.parameters = sum(p.numel() for p in state.model.parameters())
        write_result(options.out / RUN_FILE, run_file(options, self.config))
        if options.quiet:
            return
        config, facts = self.config, environment(self.ranks)
        dtype = config.dtype
        if options.config.dtype == AUTO:
            dtype += " (auto: in hardware)" if dtype == "bfloat16" else " (auto: bfloat16 would be emulated)"
        images = f"{data['training']:,} training, {data['validation']:,} validation, {data['test']:,} test images"
        source = "embedded sample" if options.data == SAMPLE else options.data
        reason = f" ({options.chose_data})" if options.chose_data else ""
        hardware = facts["cpu"] if facts["device"] == "cpu" else facts["cuda"]
        place = f"{facts['device']} ({hardware})" if hardware else facts["device"]
        shape, classes = "x".join(map(str, data["images"])), data["classes"]
        say(f"data: {source}{reason}: {images}, {len(classes)} classes, {shape}")
        for remark in self.remarks:
            say(f"data: {remark}")
        say(
            f"model: {config.model}, {config.optimizer}, batch {config.batch_size}, at most {config.epochs} epochs, "
            f"{dtype}, on {place}, {facts['backend']} backend"
        )
        say(f"protocol {config.protocol}: {PROTOCOLS[config.protocol]}")
        if options.resume and not (options.out / LAST).exists():
            say(f"{options.out} holds no checkpoint yet: starting from the beginning")
        say(f"folder: {options.out}")

    def on_end(self, result: Result) -> None:
        """Write the figures and say what happened."""
        out, options = self.options.out, self.options
        figures = result_dict(result, environment(self.ranks), self.data)
        write_result(out / "result.json", figures | {"asked": dict(options.asked), "scale": options.scale})
        if result.figures:
            try:
                write_curves(out / "curves.png", result)
            except ImportError:
                say("no curves.png: pip install matplotlib", sys.stderr)
        if not options.quiet:
            say(table(result, self.parameters, self.data, out))
            if (out / "tensorboard").exists():
                say(f"to look at the curves, the weights and the masks: tensorboard --logdir {out / 'tensorboard'}")
        if skipped := self.data["skipped"]:
            say("\n".join([f"left out, {len(skipped)} in all:", *(f"  {fault}" for fault in skipped)]), sys.stderr)
        if result.interrupted:
            say(f"interrupted; to continue: {_command()} --resume --out {out}", sys.stderr)


def _command() -> str:
    """How this program was called, without its flags."""
    program = sys.argv[0]
    return f"python {program}" if program.endswith(".py") else Path(program).name


#: A first step of so many seconds is measured enough: what it does but once is little beside it.
LONG_STEP = 5.0


def images_per_second(config: Config, train_set: Labelled, ranks: Ranks, seconds: float = 3.0) -> float:
    """Images a second of the training step, from augmentation to optimizer, all processes together.

    A network of its own takes the steps, and torch's random generators are put back. The first step, which chooses
    kernels and gets memory, is not counted.

    Args:
        config: with a dtype of its own, not ``auto``.
        train_set: holds at least one batch.
        ranks: the processes, which must all call this; each takes its share of the batch, eager and without exchange.
        seconds: to measure for; at least two steps are taken, unless the first takes ``LONG_STEP``.
    """
    alone = Ranks(0, 1, ranks.device)
    share = config.batch_size // ranks.world_size
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tempfile.TemporaryDirectory() as folder,
        out_of_memory_explained(ranks.device, config.batch_size),
        run_folder(Path(folder), alone) as lock,
    ):
        mine = dataclasses.replace(config, batch_size=share)
        run = Run(
            mine.create_model(),
            train_set,
            None,
            mine,
            Path(folder),
            alone,
            lock,
            normalize=build_normalize(train_set, mine),
        )
        run.prepare("eager", None, quiet=True)
        rate = share / _step_seconds(run, seconds)
    return float(ranks.sum(torch.tensor(rate, dtype=torch.float64, device=ranks.device)))


def fitting_scale(
    config: Config, train_set: Labelled, val_set: Labelled | None, ranks: Ranks
) -> tuple[str, dict[str, float]]:
    """:func:`choose_scale` by the speed measured here, once for each width looked at."""
    rates: dict[float, float] = {}

    def seconds(candidate: Config) -> float:
        width = candidate.model_options.get("width", 1.0)
        if width not in rates:
            rates[width] = images_per_second(candidate, train_set, ranks)
        return run_seconds(candidate, len(train_set), len(val_set or ()), rates[width])

    return choose_scale(config, seconds)


def _step_seconds(run: Run, seconds: float) -> float:
    run.state.model.train()
    times: list[float] = []
    for parts in run.batches.plan():
        start = time.perf_counter()
        run.step(*parts)[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
        if times[0] > LONG_STEP:
            return times[0]
        if len(times) > 2 and sum(times[1:]) > seconds:
            break
    counted = times[1:] or times
    return sum(counted) / len(counted)


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
