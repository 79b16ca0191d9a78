"""Checkpoints: written whole or not at all; read with ``weights_only=True``, and checked before they are used.

The first half says what a checkpoint holds (its entries, their types and ranges), the second half writes and reads it.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import one_line
from .._files import require_regular, write_atomically
from ..data import Normalize
from ..models import ImageClassifier
from .config import Config
from .evaluation import EarlyStopping, EpochFigures
from .system import CheckpointError, write_failure


class Misfit(ValueError):
    """An entry is missing or not what it must be; the text names it, the rule and what is there."""


#: The end of a key of ``state_dict()`` whose value is the module's own affair (``nn.Module.get_extra_state``).
EXTRA_STATE = "_extra_state"
#: Checks one value, of the name given; raises :class:`Misfit`.
Rule = Callable[[str, Any], None]


def require_entries(state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Check the entries ``names`` of a checkpoint, by :data:`ENTRIES`.

    >>> require_entries({"epoch": -1}, ("epoch",))
    Traceback (most recent call last):
        ...
    ran_ext.train.checkpoint.Misfit: 'epoch' must be a whole number >= 0, got -1
    """
    for name in names:
        if name in ("asked", "scheduler", "classes", "shape") and name not in state:  # older files have none
            continue
        if name not in state:
            raise Misfit(f"it has no {name!r}")
        ENTRIES[name](name, state[name])
    if "epoch" in names and "config" in names:
        _require_a_place_in_the_run(state)


def load_weights(name: str, module: nn.Module, weights: Mapping[str, Any]) -> None:
    """``module.load_state_dict(weights)``; where they do not fit, the module is left as it was.

    >>> load_weights("model", nn.Linear(3, 1, bias=False), {"weight": torch.ones(1, 2)})
    Traceback (most recent call last):
        ...
    ran_ext.train.checkpoint.Misfit: 'model' is of another network: ... size mismatch for weight: ...
    """
    own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in module.state_dict().items()}
    for key, tensor in own.items():
        other = weights.get(key)
        if isinstance(tensor, Tensor) and isinstance(other, Tensor) and _kind(other) != _kind(tensor):
            raise Misfit(f"{f'{name}.{key}'!r} must be {describe(tensor)}, got {describe(other)}")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        module.load_state_dict(own)
        raise Misfit(f"{name!r} is of another network: {one_line(error)}") from error


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def describe(value: object) -> str:
    """A value in few words.

    >>> describe(torch.ones(2, 3)), describe([1]), describe("x")
    ('float32 [2, 3]', 'list', "'x'")
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    short = value is None or isinstance(value, (bool, int, float, str))
    return repr(value)[:60] if short else type(value).__name__


def _rule(what: str, holds: Callable[[Any], bool]) -> Rule:
    def check(name: str, value: Any) -> None:
        if not holds(value):
            raise Misfit(f"{name!r} must be {what}, got {describe(value)}")

    return check


def _is_dense(value: Any) -> bool:
    """An ordinary tensor, with a value for each element."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _config(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Misfit(f"{name!r} must be a recipe, got {describe(value)}")
    try:
        Config.from_dict(value)
    except (ValueError, TypeError) as error:
        raise Misfit(f"{name!r} is no recipe of this version ({one_line(error)})") from error


def _tensors(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise Misfit(f"{name!r} must be a dict of tensors, got {describe(value)}")
    for key, tensor in value.items():
        if not isinstance(key, str) or not (_is_dense(tensor) or key.endswith(EXTRA_STATE)):
            raise Misfit(f"{name!r} must be a dict of tensors, got {describe(key)}: {describe(tensor)}")


def _fields(kind: type, rules: Mapping[str, Rule]) -> Rule:
    """A dict of a dataclass's fields."""
    names = {field.name for field in dataclasses.fields(kind)}

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict) or value.keys() != names:
            raise Misfit(f"{name!r} must have the entries {', '.join(sorted(names))}, got {describe(value)}")
        for key in sorted(names):
            rules[key](f"{name}.{key}", value[key])

    return check


def _list_of(rule: Rule) -> Rule:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, list):
            raise Misfit(f"{name!r} must be a list, got {describe(value)}")
        for index, item in enumerate(value):
            rule(f"{name}[{index}]", item)

    return check


def _optional(rule: Rule) -> Rule:
    return lambda name, value: None if value is None else rule(name, value)


def _optimizer(name: str, value: Any) -> None:
    parts = isinstance(value, dict) and isinstance(value.get("state"), dict)
    if not parts or not isinstance(value.get("param_groups"), list):
        raise Misfit(f"{name!r} must have a dict 'state' and a list 'param_groups', got {describe(value)}")
    for key, entry in value["state"].items():
        if not _is_count(key):
            raise Misfit(f"{name + '.state'!r} must be by the parameters' numbers, got {describe(key)}")
        if not isinstance(entry, dict) or not all(isinstance(part, str) for part in entry):
            raise Misfit(f"{f'{name}.state[{key}]'!r} must be a dict of names, got {describe(entry)}")
        for part, held in entry.items():  # numbers and None: of an optimizer of the user's
            if not (_is_dense(held) or held is None or isinstance(held, (bool, int, float, str))):
                raise Misfit(f"{f'{name}.state[{key}].{part}'!r} must be a tensor or a number, got {describe(held)}")
    for index, group in enumerate(value["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise Misfit(f"{f'{name}.param_groups[{index}]'!r} must have a list 'params', got {describe(group)}")


def _average(name: str, value: Any) -> None:
    if not isinstance(value, dict) or value.keys() != {"average", "steps"}:
        raise Misfit(f"{name!r} must have 'average' and 'steps', got {describe(value)}")
    _tensors(f"{name}.average", value["average"])
    _rule("one number", lambda steps: _is_dense(steps) and steps.dim() == 0)(f"{name}.steps", value["steps"])


def _normalize(name: str, value: Any) -> None:
    if not isinstance(value, dict) or value.keys() != {"scale", "offset"}:
        raise Misfit(f"{name!r} must have 'scale' and 'offset', got {describe(value)}")
    shaped = _rule("float32 (C, H, W)", lambda v: _is_dense(v) and v.dtype == torch.float32 and v.dim() == 3)
    shaped(f"{name}.scale", value["scale"])
    shaped(f"{name}.offset", value["offset"])


def _generators(name: str, value: Any) -> None:
    states = isinstance(value, list) and 1 <= len(value) <= 2
    if not states or not all(_is_dense(part) and part.dtype == torch.uint8 and part.dim() == 1 for part in value):
        raise Misfit(f"{name!r} must be the state of one or two random generators, got {describe(value)}")
    try:
        torch.Generator().set_state(value[0].cpu())
    except RuntimeError as error:
        raise Misfit(f"{name!r} is not the state of a random generator: {one_line(error)}") from error


def _require_a_place_in_the_run(state: Mapping[str, Any]) -> None:
    """Epoch, figures and history must agree."""
    epoch, epochs, steps = state["epoch"], state["config"]["epochs"], len(state["history"])
    if epoch > epochs or (epoch == epochs and steps):
        raise Misfit(f"'epoch' must be at most {epochs}, the last one, got {epoch} and {steps} steps")
    if [row["epoch"] for row in state["figures"]] != list(range(1, epoch + 1)):
        raise Misfit(f"'figures' must have a row for each of the {epoch} epochs, got {len(state['figures'])}")


_COUNT = _rule("a whole number >= 0", _is_count)
_NUMBER = _rule("a finite number", _is_number)
_FIGURES = dict.fromkeys((field.name for field in dataclasses.fields(EpochFigures)), _NUMBER)

#: The rule of each entry.
ENTRIES: dict[str, Rule] = {
    "config": _config,
    "model": _tensors,
    "optimizer": _optimizer,
    "scaler": _optional(_rule("a dict of numbers", lambda v: isinstance(v, dict) and all(map(_is_number, v.values())))),
    "scheduler": _optional(_rule("a dict", lambda v: isinstance(v, dict))),
    "ema": _optional(_average),
    "stopping": _fields(
        EarlyStopping,
        {
            "patience": _COUNT,
            "best": _rule("a number", lambda value: isinstance(value, float) and not math.isnan(value)),
            "best_epoch": _rule("a whole number >= -1", lambda value: value == -1 or _is_count(value)),
            "bad_epochs": _COUNT,
        },
    ),
    "history": _rule(
        "floating point (steps, 2)",
        lambda v: _is_dense(v) and v.is_floating_point() and v.dim() == 2 and v.shape[1] == 2,
    ),
    "epoch": _COUNT,
    "seconds": _rule("a number >= 0", lambda value: _is_number(value) and value >= 0),
    "figures": _list_of(
        _fields(
            EpochFigures,
            _FIGURES | {"epoch": _COUNT, "val_loss": _optional(_NUMBER), "val_accuracy": _optional(_NUMBER)},
        )
    ),
    "rng": _list_of(_generators),
    "images": _COUNT,
    "asked": _rule("a dict of text", lambda v: isinstance(v, dict) and all(isinstance(t, str) for t in v.values())),
    "normalize": _optional(_normalize),
    "classes": _optional(_list_of(_rule("text", lambda v: isinstance(v, str)))),
    "shape": _optional(_rule("(C, H, W)", lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_count, v)))),
}
#: What ``last.pt`` holds, beside what follows from the training set and is there for whoever uses the network.
TRAINING = tuple(name for name in ENTRIES if name not in ("normalize", "classes", "shape"))


FORMAT = 1


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists and dicts of them) to ``path``.

    Raises:
        CheckpointError: it cannot be written; what stood at ``path`` is intact.
    """
    buffer = io.BytesIO()  # torch.save to a full disk raises errors of its own that hide the reason
    torch.save({"format": FORMAT, **state}, buffer)
    try:
        write_atomically(Path(path), buffer.getvalue())
    except OSError as error:
        raise CheckpointError(write_failure(str(path), error) + "; the checkpoint before it is intact") from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: there is no such file, or it is damaged or no checkpoint of this package.
    """
    try:
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            # compressed or overlapping records may expand to any size; torch compresses none
            if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
                raise zipfile.BadZipFile("its records are larger than the file")
            if archive.testzip() is not None:  # torch.load compares no checksums
                raise zipfile.BadZipFile("a checksum does not fit")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; name another, or train without --resume") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or one_line(error)}; name another") from error
    except Exception as error:  # a damaged file raises RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise CheckpointError(
            f"cannot read {path}: it is damaged or no checkpoint ({type(error).__name__}); use another checkpoint, "
            "such as model.pt beside it, or train anew in another folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no ran_ext checkpoint of format {FORMAT}; name another")
    return state


@contextmanager
def misfit_explained(path: str | Path) -> Iterator[None]:
    """Turn a :class:`Misfit` into a :class:`CheckpointError` that names the file."""
    try:
        yield
    except Misfit as error:
        raise CheckpointError(
            f"{path} is no checkpoint of a training that can be used here: {one_line(error)}; name another, or train "
            "anew in another folder"
        ) from error


def read_entries(path: str | Path, names: tuple[str, ...], device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of :func:`ran_ext.train.fit`, its entries ``names`` checked.

    Raises:
        CheckpointError: it cannot be read, or an entry is missing or not what it must be.
    """
    state = load_checkpoint(path, device)
    with misfit_explained(path):
        require_entries(state, names)
    return state


def load_config(checkpoint: str | Path) -> Config:
    """The recipe of a checkpoint of :func:`ran_ext.train.fit`.

    Raises:
        CheckpointError: the file cannot be read, or holds none.
    """
    return Config.from_dict(read_entries(checkpoint, ("config",))["config"])


def load_model(checkpoint: str | Path, device: torch.device | str = "cpu") -> ImageClassifier:
    """The trained network of a checkpoint of :func:`ran_ext.train.fit`, in evaluation mode.

    Name and options of the model come from the checkpoint; where a moving average was kept, its weights are taken.

    Raises:
        CheckpointError: the file cannot be read, or holds another model than its configuration says.
    """
    state = read_entries(checkpoint, ("config", "model"), device)
    with misfit_explained(checkpoint):
        if state.get("ema") is not None:
            require_entries(state, ("ema",))
        try:
            model = Config.from_dict(state["config"]).create_model().to(device)
        except ValueError as error:
            raise Misfit(one_line(error)) from error
    weights = state["ema"]["average"] if state.get("ema") else state["model"]
    try:
        load_weights("model", model, weights)
    except Misfit as error:
        raise CheckpointError(
            f"{checkpoint} holds weights of another model than its configuration names ({state['config']['model']}: "
            f"{error}); build that model yourself and load load_checkpoint(path)['model'] into it"
        ) from error
    return model.eval()


def load_classes(checkpoint: str | Path) -> list[str] | None:
    """The names of a checkpoint's classes in the order of the logits; None where the training set had none."""
    return read_entries(checkpoint, ("classes",)).get("classes")


def load_shape(checkpoint: str | Path) -> list[int] | None:
    """``(C, H, W)`` of the training images; None where they came from a loader."""
    return read_entries(checkpoint, ("shape",)).get("shape")


def load_normalize(checkpoint: str | Path, memory_format: torch.memory_format | None = None) -> Normalize:
    """The normalisation that the checkpoint's network was trained with; for :func:`ran_ext.train.evaluate`, or by hand.

    Its call takes uint8 images ``(N, C, H, W)`` of the training images' size (any size where ``config.normalize`` was
    ``per_channel``) and returns what the network takes.

    Raises:
        CheckpointError: the file cannot be read, or holds none, as where the training images were floating.
    """
    normalize = _normalize_of(read_entries(checkpoint, ("normalize",)), memory_format)
    if normalize is None:
        raise CheckpointError(
            f"{checkpoint} has no 'normalize': its images were normalised by their data set; do that by hand"
        )
    return normalize


def kept_normalize(last: Path, config: Config) -> Normalize | None:
    """That of a run to go on with; None where its images were floating."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return _normalize_of(read_entries(last, ("normalize",)), layout)


def _normalize_of(state: Mapping[str, Any], memory_format: torch.memory_format | None) -> Normalize | None:
    if (kept := state["normalize"]) is None:
        return None
    normalize = Normalize(torch.zeros_like(kept["offset"]), None, memory_format)
    normalize.scale, normalize.offset = kept["scale"], kept["offset"]  # as they were, without a round trip
    return normalize
