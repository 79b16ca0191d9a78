"""``ran-ext-train``: train one of the networks on CIFAR-10."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._errors import one_line
from .._files import write_atomically
from ..data import CIFAR10, DatasetError, split_validation
from .arguments import RUN_FILE, SAMPLE, Options, parse, require_no_run, run_file
from .batches import build_normalize
from .callbacks import Callback
from .config import Config
from .distributed import Ranks, process_group
from .dtype import resolve_dtype
from .environment import environment
from .errors import TrainingError, write_failure
from .loop import fit
from .probe import fitting_scale
from .progress import say
from .report import PROTOCOLS, result_dict, table, write_curves, write_result
from .results import Result
from .run import LAST
from .scales import AUTO, SCALES, expected_accuracy, explain_choice
from .state import TrainingState
from .tensorboard import TensorBoardLogger

#: Test images whose attention masks TensorBoard shows.
MASK_IMAGES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 after an error, 130 after an interruption."""
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
    train_set, val_set, test_set = load_data(options.data, options.config)
    torch.backends.cudnn.benchmark = True
    options = fit_to_machine(options, train_set, val_set, ranks)
    config = options.config
    resolved = resolve_dtype(config, ranks, options.out / LAST if options.resume else None)
    torch.manual_seed(config.seed)
    model = config.create_model()
    if model.fc.out_features <= (highest := int(train_set.labels.max())):
        raise ValueError(f"--model-option num_classes must be more than {highest}, got {model.fc.out_features}")
    data = {
        "source": options.data,
        "training": len(train_set),
        "validation": len(val_set) if val_set else 0,
        "test": len(test_set),
    }
    record = Record(options, resolved, data, ranks)
    result = fit(
        model,
        train_set,
        val_set,
        config,
        options.out,
        test_set=test_set,
        ranks=ranks,
        resume=options.resume,
        callbacks=[record, *loggers(options, train_set, test_set)] if ranks.first else (),
        step=options.step,
        checkpoint_every=options.checkpoint_every,
        quiet=options.quiet,
    )
    return 130 if result.interrupted else 0


def fit_to_machine(options: Options, train_set: CIFAR10, val_set: CIFAR10 | None, ranks: Ranks) -> Options:
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


def load_data(source: str, config: Config) -> tuple[CIFAR10, CIFAR10 | None, CIFAR10]:
    """Training, validation and test images from ``sample`` or a folder, split as ``config.protocol`` says.

    The images held out are the same ones for every seed, so that seeds can be compared.

    Raises:
        DatasetError: files are missing or damaged.
        ValueError: there are not so many images to hold out.
    """
    train_set, test_set = (
        CIFAR10.sample(split) if source == SAMPLE else CIFAR10(source, split) for split in ("train", "test")
    )
    if config.protocol == "report":
        return train_set, test_set, test_set
    if not config.val_images:
        return train_set, None, test_set
    train_set, val_set = split_validation(train_set, config.val_images)
    return train_set, val_set, test_set


def loggers(options: Options, train_set: CIFAR10, test_set: CIFAR10) -> list[Callback]:
    """TensorBoard, where it is wanted and installed."""
    if not options.tensorboard:
        return []
    try:
        normalize = build_normalize(train_set, options.config)
        return [TensorBoardLogger(options.out / "tensorboard", test_set.images[:MASK_IMAGES], normalize)]
    except ImportError:
        print("no TensorBoard files: pip install tensorboard", file=sys.stderr)
        return []


class Record(Callback):
    """What the command writes and prints when training begins and ends; the run's folder is its own meanwhile.

    ``config`` is what the options came to on this machine: with a dtype, not ``auto``.
    """

    def __init__(self, options: Options, config: Config, data: Mapping[str, Any], ranks: Ranks):
        self.options, self.config, self.data, self.ranks = options, config, data, ranks

    def on_start(self, state: TrainingState, step: int) -> None:
        """Write ``run.json``, now that everything is accepted, and say what is about to happen."""
        options, data = self.options, self.data
        require_no_run(options.out, options.resume)  # another run may have ended since the flags were read
        self.parameters = sum(p.numel() for p in state.model.parameters())
        try:
            write_atomically(options.out / RUN_FILE, run_file(options, self.config))
        except OSError as error:
            raise TrainingError(write_failure(str(options.out / RUN_FILE), error)) from error
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
        say(f"data: {source}{reason}: {images}")
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
        if result.interrupted:
            say(f"interrupted; to continue: {_command()} --resume --out {out}", sys.stderr)


def _command() -> str:
    """How this program was called, without its flags."""
    program = sys.argv[0]
    return f"python {program}" if program.endswith(".py") else Path(program).name
