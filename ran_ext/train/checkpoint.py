"""Checkpoints: written to the side, synced and renamed; read with ``weights_only=True``."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import Normalize
from ..models import ResidualAttentionNetwork
from .config import Config
from .errors import CheckpointError, write_failure

FORMAT = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, whole or not at all, also when the power fails half-way."""
    side = path.with_name(path.name + ".partial")
    try:
        with open(side, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(side, path)
    except OSError:
        with contextlib.suppress(OSError):
            side.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum does not fit")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; name another, or train without --resume") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file shows as RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise CheckpointError(
            f"cannot read {path}: it is damaged or no checkpoint ({type(error).__name__}); use another checkpoint, "
            "such as model.pt beside it, or train anew in another folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no ran_ext checkpoint of format {FORMAT}; name another")
    return state


def load_model(checkpoint: str | Path, device: torch.device | str = "cpu") -> ResidualAttentionNetwork:
    """The trained network of a checkpoint of :func:`ran_ext.train.fit`, in evaluation mode.

    Name and options of the model come from the checkpoint; where a moving average was kept, its weights are taken.

    Raises:
        CheckpointError: the file cannot be read, or holds another model than its configuration says.
    """
    state = load_checkpoint(checkpoint, device)
    if not {"config", "model"} <= state.keys():
        raise CheckpointError(f"{checkpoint} is no checkpoint of a training; name a model.pt or last.pt of fit")
    model = Config.from_dict(state["config"]).create_model().to(device)
    weights = state["ema"]["average"] if state.get("ema") else state["model"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} holds weights of another model than its configuration names ({state['config']['model']}): "
            "build that model yourself and load load_checkpoint(path)['model'] into it"
        ) from error
    return model.eval()


def load_normalize(checkpoint: str | Path, memory_format: torch.memory_format | None = None) -> Normalize:
    """The normalisation that the checkpoint's network was trained with; for :func:`ran_ext.train.evaluate`, or by hand.

    Its call takes uint8 images ``(N, 3, H, W)`` of the training images' size (any size where ``config.normalize`` was
    ``per_channel``) and returns what the network takes.
    """
    state = load_checkpoint(checkpoint)["normalize"]
    normalize = Normalize(torch.zeros_like(state["offset"]), None, memory_format)
    normalize.scale, normalize.offset = state["scale"], state["offset"]  # as they were, without a round trip
    return normalize
