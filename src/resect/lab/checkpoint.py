"""Checkpoints: a folder ``checkpoint-000012``, after 12 steps, with tensors.safetensors and state.json.

Both files are written and synced in a hidden folder, which is then renamed: the name appears only once the
checkpoint is complete, and only then the one before it goes. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from resect.errors import FileError
from resect.files import read_tensors, whole_folder
from resect.lab.tree import flatten, unflatten

FORMAT = "resect-checkpoint-2"
PREFIX = "checkpoint-"


def checkpoints(folder: Path) -> dict[Path, int]:
    """The checkpoints in ``folder``, and their numbers; what is named otherwise, as a copy may be, is none of them."""
    named = ((path, re.fullmatch(rf"{PREFIX}([0-9]+)", path.name)) for path in folder.glob(f"{PREFIX}*"))
    return {path: int(match[1]) for path, match in named if match}


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest number in ``folder``, if there is one."""
    found = checkpoints(folder)
    return max(found, key=found.__getitem__, default=None)


def save(folder: Path, number: int, state: dict[str, Any]) -> Path:
    """Write checkpoint ``number`` (a count of optimizer steps) and remove older ones.

    ``state`` is nested dicts, lists and tuples of tensors and JSON data.

    Raises:
        FileError: it could not be written (a full disk); the older checkpoint is then whole and in place.
    """
    tensors: dict[str, Tensor] = {}
    plain = flatten(state, tensors, "state")
    content = safetensors.torch.save(tensors)
    record = {
        "format": FORMAT,
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
        "state_sha256": _digest(plain),
        "state": plain,
    }
    target = folder / f"{PREFIX}{number:06d}"
    for stale in folder.glob(f".{PREFIX}*.tmp"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with whole_folder(target, own=("state.json", "tensors.safetensors")) as partial:
        (partial / "tensors.safetensors").write_bytes(content)
        (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
    for old in checkpoints(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def load(path: Path) -> dict[str, Any]:
    """The state that was given to `save`, tensors on the CPU.

    Raises:
        FileError: a file is missing, truncated, altered, or was not written by Resect.
    """
    file = path / "state.json"
    try:
        record = json.loads(file.read_bytes())
    except OSError as error:
        raise FileError(f"Cannot read checkpoint {path}: {file.name}: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileError(f"Checkpoint {path} is damaged: {file.name} is not whole JSON.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileError(f"{path} is not a checkpoint of this version of Resect ({FORMAT}).")
    if _digest(record.get("state")) != record.get("state_sha256"):
        raise FileError(f"Checkpoint {path} is damaged: {file.name} was altered after it was written.")
    return unflatten(record["state"], read_tensors(path / "tensors.safetensors", str(record["tensors_sha256"])))


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
