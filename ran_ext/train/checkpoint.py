"""Checkpoints: written whole or not at all; read with ``weights_only=True``, and checked before they are used."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._errors import one_line
from .._files import require_regular, write_atomically
from ..data import Normalize
from ..models import ResidualAttentionNetwork
from .config import Config
from .errors import CheckpointError, write_failure
from .schema import Misfit, load_weights, require_entries

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
            # records that are packed, or overlap, may unfold to any size; torch packs none
            if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
                raise zipfile.BadZipFile("its records are larger than the file")
            if archive.testzip() is not None:  # torch.load compares no checksums
                raise zipfile.BadZipFile("a checksum does not fit")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; name another, or train without --resume") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or one_line(error)}; name another") from error
    except Exception as error:  # a damaged file shows as RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise CheckpointError(
            f"cannot read {path}: it is damaged or no checkpoint ({type(error).__name__}); use another checkpoint, "
            "such as model.pt beside it, or train anew in another folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no ran_ext checkpoint of format {FORMAT}; name another")
    return state


@contextmanager
def misfit_explained(path: str | Path) -> Iterator[None]:
    """Turn a :class:`~ran_ext.train.schema.Misfit` into a :class:`CheckpointError` that names the file."""
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


def load_model(checkpoint: str | Path, device: torch.device | str = "cpu") -> ResidualAttentionNetwork:
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


def load_normalize(checkpoint: str | Path, memory_format: torch.memory_format | None = None) -> Normalize:
    """The normalisation that the checkpoint's network was trained with; for :func:`ran_ext.train.evaluate`, or by hand.

    Its call takes uint8 images ``(N, 3, H, W)`` of the training images' size (any size where ``config.normalize`` was
    ``per_channel``) and returns what the network takes.

    Raises:
        CheckpointError: the file cannot be read, or holds none.
    """
    state = read_entries(checkpoint, ("normalize",))["normalize"]
    normalize = Normalize(torch.zeros_like(state["offset"]), None, memory_format)
    normalize.scale, normalize.offset = state["scale"], state["offset"]  # as they were, without a round trip
    return normalize
