"""The command line: one flag for each field of :class:`Config`, explained by its docstring."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import os
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._command import Parser
from .._errors import one_line
from .._files import require_regular
from .._info import versions
from ..data.folders import is_folder_of_classes
from ..models import ran_compact
from .config import AUTO, CHOICES, LIMIT, PRESETS, SCALES, Config
from .state import LAST
from .step import STEPS
from .system import TrainingError

#: The name that stands for the embedded images, and the folder looked for first.
SAMPLE, DATA_FOLDER = "sample", Path("data")
#: The greatest side of an image.
MOST_PIXELS = 4096
#: Written beside the checkpoints: the recipe and the source of the images, for ``--resume``.
RUN_FILE = "run.json"
#: The recipe's flags in ``--help-all``, by subject; those of ``COMMON`` are in ``--help`` too.
GROUPS = {
    "the network": ("model", "model_options", "dropout"),
    "length, and what is kept": (
        *("epochs", "batch_size", "accumulate", "patience", "select", "protocol", "val_images", "test_mirror"),
    ),
    "optimizer": ("optimizer", "lr", "momentum", "weight_decay", "weight_decay_scope", "label_smoothing", "ema"),
    "schedule": ("schedule", "lr_step_epochs", "lr_step_factor", "warmup"),
    "images": ("augment", "cutout", "mixup", "normalize"),
    "numbers": ("dtype", "channels_last", "seed"),
}
COMMON = ("model", "epochs", "batch_size", "optimizer", "lr", "dtype", "seed")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        config: the recipe.
        data: ``sample``, or a folder.
        image_size: side of the images that pictures in files are resized to; None for what fits them.
        skip_broken: whether to leave out pictures that cannot be read.
        workers: processes that read pictures.
        out: folder of the run.
        resume: continue the run in ``out``.
        device: ``auto``, ``cpu``, ``cuda``, ...
        step: kind of training step.
        checkpoint_every: epochs.
        tensorboard: whether to write TensorBoard's files.
        quiet: print nothing but errors.
        chose_data: why ``data`` was chosen, where the user did not name it.
        scale: of the run on the embedded images: one of ``SCALES``, or ``auto`` for the one that fits the machine; ""
            where the recipe alone says how long the run is.
        asked: the user's ``dtype`` and ``scale``, of which the machine may decide (``auto``).
        given: the recipe's fields that the user, or the run to continue, has decided; the others may follow the data.
    """

    config: Config
    data: str
    image_size: int | None
    skip_broken: bool
    workers: int
    out: Path
    resume: bool
    device: str
    step: str
    checkpoint_every: int
    tensorboard: bool
    quiet: bool
    chose_data: str
    scale: str
    asked: Mapping[str, str]
    given: frozenset[str]


def build_parser(everything: bool = False) -> argparse.ArgumentParser:
    """The parser; its ``--help`` explains all flags, or those of most runs."""
    parser = Parser(
        prog="ran-ext-train",
        description="Train a network on pictures in folders or CIFAR. Under torchrun the processes share each batch.",
        usage="%(prog)s [--data DIR] [--preset NAME] [--out DIR] [--epochs N] ...",
    )
    parser.add_argument("--help-all", action=_HelpAll, help="show every flag, those of the whole recipe too, and exit")
    parser.add_argument("--version", action=_Version, help="show the versions of ran_ext and torch, and exit")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="the recipe to start from (default: by the data: sample, pictures or report)",
    )
    run.add_argument(
        "--data",
        metavar="DIR",
        help="folder of class folders with pictures, or of train/, val/ and test/ with such; of CIFAR-10 or CIFAR-100; "
        f"or '{SAMPLE}', the embedded images (default: the folder {DATA_FOLDER} if it is there, else {SAMPLE})",
    )
    run.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side that pictures are resized to (default: their own, up to 224)",
    )
    run.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    workers = min(4, os.cpu_count() or 1)
    run.add_argument(
        "--workers", type=int, default=workers, metavar="N", help="processes that read pictures (default: %(default)s)"
    )
    sizes = "; ".join(f"{name}: {scale}" for name, scale in SCALES.items())
    run.add_argument(
        "--scale",
        choices=[AUTO, *SCALES],
        help=f"how long the run on the embedded images is ({sizes}); auto times a few steps and takes the largest that "
        f"ends within {LIMIT / 60:.0f} minutes (default: auto, unless --epochs or the network is given)",
    )
    run.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML or JSON file of settings, or a run's run.json; flags come before it",
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: a new one in runs)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    run.add_argument("--device", default="auto", help="auto (cuda where there is one, else cpu), or any that torch has")
    run.add_argument(
        "--step",
        choices=STEPS,
        default="auto",
        help="the training step: eager, one CUDA graph, or through torch.compile (default: auto, which is graph on one "
        "GPU, else eager)",
    )
    run.add_argument(
        "--checkpoint-every", type=int, default=1, metavar="N", help="epochs between checkpoints (default: 1)"
    )
    run.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="write no TensorBoard files")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    fields, explained = {field.name: field for field in dataclasses.fields(Config)}, _field_docs()
    if everything:
        for title, names in GROUPS.items():
            group = parser.add_argument_group(f"{title} (defaults of the preset 'report')")
            for name in names:
                _add_field(group, fields[name], explained.get(name, ""))
    else:
        group = parser.add_argument_group("the recipe (--help-all has the rest)")
        for name, field in fields.items():
            _add_field(group, field, explained.get(name, "") if name in COMMON else argparse.SUPPRESS)
    return parser


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        build_parser(everything=True).print_help()
        parser.exit()


class _Version(_HelpAll):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(versions())
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options of a command line.

    Raises:
        TrainingError: they contradict each other or the run in the folder.
        ValueError: a value is out of its range.
        SystemExit: a flag is unknown or malformed (argparse prints why).
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        if name in inspect.signature(ran_compact).parameters:
            parser.error(f"{unknown[0]}: it is an option of the network, --model-option {name}=VALUE")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if hasattr(args, field.name)}
    if "model_options" in given:
        given["model_options"] = dict(given["model_options"])
    flags, filed = given.keys(), read_config(args.config) if args.config else {}
    given = {**filed, **given}
    if "model_options" in flags:
        given["model_options"] = {**filed.get("model_options", {}), **given["model_options"]}
    if args.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be at least 1, got {args.checkpoint_every}")
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    if args.image_size is not None and not 1 <= args.image_size <= MOST_PIXELS:
        raise ValueError(f"--image-size must be from 1 to {MOST_PIXELS}, got {args.image_size}")
    if args.resume and args.out is None:
        raise TrainingError("--resume needs --out, the folder of the run to continue")
    if args.resume and not any(os.path.lexists(args.out / name) for name in (RUN_FILE, LAST)):
        raise TrainingError(
            f"--resume: there is no run in {args.out} (it has neither {RUN_FILE} nor {LAST}); mend --out, or leave "
            "--resume out to begin one"
        )
    found = _read_run(args.out) if args.resume else None
    chose = scale = ""
    asked: Mapping[str, str] = {}
    image_size, skip_broken, decided = args.image_size, args.skip_broken, frozenset(given)
    if found:
        base, data, scale, asked, (image_size, skip_broken) = found
        decided = frozenset(field.name for field in dataclasses.fields(Config))
        for name in ("preset", "scale", "config", "image_size", "skip_broken"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise TrainingError(f"--resume takes the run's own settings: leave --{flag} out")
        if given.get("dtype") == AUTO:
            del given["dtype"]  # the run's own
        data = args.data or data
    else:
        data, chose = (args.data, "") if args.data else _choose_data(args.preset)
        of_pictures = data != SAMPLE and is_folder_of_classes(Path(data))
        preset = args.preset or ("sample" if data == SAMPLE else "pictures" if of_pictures else "report")
        base = PRESETS[preset]
        # a run in the folder has a size already, though nothing says which
        sized = args.resume or not given.keys().isdisjoint(("epochs", "model", "model_options"))
        scale = _choose_scale(args.scale, data == SAMPLE and preset == "sample", sized, "epochs" in given)
        if scale in SCALES:
            base = SCALES[scale].apply(base)
    if "model_options" in given:
        given["model_options"] = {**base.model_options, **given["model_options"]}
    config = dataclasses.replace(base, **given)
    idle = config.without_effect() | ({"val_images": "protocol is 'report'"} if config.protocol == "report" else {})
    for name in flags & idle.keys():
        raise TrainingError(f"--{name.replace('_', '-')} has no effect where {idle[name]}; leave it out")
    asked = asked or {"dtype": config.dtype, "scale": scale}
    out = args.out or Path("runs") / f"{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    require_no_run(out, args.resume)
    return Options(
        config,
        data,
        image_size,
        skip_broken,
        args.workers,
        out,
        args.resume,
        args.device,
        args.step,
        args.checkpoint_every,
        args.tensorboard,
        args.quiet,
        chose,
        scale,
        asked,
        decided,
    )


def require_no_run(out: Path, resume: bool) -> None:
    """Refuse to begin where a run is already."""
    if not resume and os.path.lexists(out / LAST):
        raise TrainingError(f"{out} holds a run already: add --resume to continue it, or choose another --out")


def run_file(options: Options, config: Config) -> dict[str, Any]:
    """The contents of ``run.json``; ``config`` is what the options came to on this machine."""
    pictures = {"image_size": options.image_size, "skip_broken": options.skip_broken}
    run = {"data": options.data, "pictures": pictures, "asked": dict(options.asked), "scale": options.scale}
    return run | {"config": config.to_dict()}


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a recipe in a TOML or JSON file: fields of :class:`Config`, or a run's ``run.json``.

    Raises:
        ValueError: it is neither, or a field is unknown or out of its range.
        OSError: it cannot be read.
    """
    require_regular(path)
    text = path.read_text()
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON (name it .toml where it is TOML)"
        raise ValueError(f"--config: {path} is no {kind}: {one_line(error)}") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} must hold an object of settings, got {type(values).__name__}")
    try:
        Config.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config: {path}: {one_line(error)}") from error
    return values


def _choose_scale(asked: str | None, sample: bool, sized: bool, epochs: bool) -> str:
    """The scale of a run, by the flag; ``sample``: on the embedded images; ``sized``, ``epochs``: given by hand."""
    if asked and not sample:
        raise TrainingError(
            f"--scale is for the embedded images and their preset (--data {SAMPLE} --preset sample): leave it out, and "
            "give --epochs or --model-option width=... instead"
        )
    if asked == AUTO and epochs:
        raise TrainingError("--scale auto chooses the number of epochs: leave --epochs out, or name a scale")
    return asked or (AUTO if sample and not sized else "")


def _read_run(out: Path) -> tuple[Config, str, str, Mapping[str, str], tuple[int | None, bool]] | None:
    path = out / RUN_FILE
    if not os.path.lexists(path):
        return None
    try:
        require_regular(path)
        values = json.loads(path.read_text())
        config, data = Config.from_dict(values["config"]), values["data"]
        scale = values.get("scale", "")  # which older files lack, as they do "asked"
        asked = values.get("asked", {"dtype": config.dtype, "scale": ""})
        pictures = values.get("pictures", {"image_size": None, "skip_broken": False})
        read = pictures["image_size"], pictures["skip_broken"]
        if not (read[0] is None or isinstance(read[0], int)) or not isinstance(read[1], bool):
            raise TypeError("'pictures' is no size and no choice")
        if not isinstance(data, str):
            raise TypeError("'data' is no text")
        if not isinstance(scale, str) or not isinstance(asked, dict):
            raise TypeError("'scale' is no text, or 'asked' no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise TrainingError(
            f"{path} is damaged ({one_line(error)}); delete it and give the run's own flags again"
        ) from error
    return config, data, scale, asked, read


def _choose_data(preset: str | None) -> tuple[str, str]:
    if preset == "sample":
        return SAMPLE, "the preset is 'sample'"
    if DATA_FOLDER.is_dir():
        return str(DATA_FOLDER), "the folder is there"
    return SAMPLE, f"there is no folder {DATA_FOLDER}; scripts/get_cifar10.py gets the whole set"


def _field_docs() -> dict[str, str]:
    """The explanation of each field, from the class's docstring; empty where Python runs without docstrings."""
    arguments = (inspect.getdoc(Config) or "").partition("Args:\n")[2].partition("\n\n")[0]
    docs: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE):
        for name in names.split(", "):
            docs[name] = " ".join(re.sub(r":\w+:`([^`]*)`|``", r"\1", text).split())
    return docs


def _add_field(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], text: str) -> None:
    flag = "--" + field.name.replace("_", "-")
    common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
    if text is not argparse.SUPPRESS:
        text = (text.rstrip(".") + default).replace("%", "%%")
    if field.name == "model_options":
        group.add_argument(
            "--model-option", type=_key_value, action="append", metavar="NAME=VALUE", help=text, **common
        )
    elif field.type == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **common)
    elif field.name in CHOICES:
        group.add_argument(flag, choices=CHOICES[field.name], help=text, **common)
    else:
        kind = {"int": int, "float": float, "str": str}[str(field.type).split(" |")[0]]
        group.add_argument(flag, type=kind, help=text, metavar=kind.__name__.upper(), **common)


def _key_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    for read in (json.loads, ast.literal_eval):  # false, and Python's False
        try:
            return name, read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return name, value
