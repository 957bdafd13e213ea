"""Finished measurements in a file, so that a long study that was stopped goes on where it was.

JSON lines: a header that says of which study they are, then one subset and its value a line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.example import as_dict
from resect.errors import FileError, InputError
from resect.files import write_text

FORMAT = "resect-measurements-2"
_WITHOUT_DATA = "resect-measurements-1"


class Store:
    """The file of one study; ``study`` (JSON) is what must be the same for its values to be of use."""

    def __init__(self, path: str | Path, study: Mapping[str, Any]) -> None:
        self.path, self.study = Path(path), {"format": FORMAT, **study}
        self._header: dict[str, Any] | None = None

    def read(self) -> dict[tuple[str, ...], float]:
        """Return the values that are there, by subset; a last line that was not written to its end is cut off.

        Raises ``FileError`` for a file of another kind, ``InputError`` for one of another study, naming what differs.
        """
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            self._header, *rows = (json.loads(line) for line in whole.splitlines())
            found = {tuple(row["closed"]): float(row["value"]) for row in rows}
            if self._header["format"] not in (FORMAT, _WITHOUT_DATA):
                raise KeyError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"{str(self.path)!r} holds no measurements of a study, or is damaged. Choose another file."
            ) from error
        if self._header["format"] == _WITHOUT_DATA:
            raise FileError(
                f"{str(self.path)!r} was written by an earlier version of Resect and does not say what data its values "
                "come from. Choose another file."
            )
        self._compare(self.study)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return found

    def begin(self, whole: Mapping[str, Any]) -> None:
        """Write the header, with what is known of the ``whole`` model; or compare it with the one that is there."""
        if self._header is None:
            self._header = {**self.study, **whole}
            write_text(self.path, json.dumps(self._header) + "\n")
        self._compare(whole)

    def add(self, values: Iterable[tuple[tuple[str, ...], float]]) -> None:
        """Append measurements; they are on the disk when this returns."""
        lines = "".join(json.dumps({"closed": subset, "value": value}) + "\n" for subset, value in values)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileError(f"{str(self.path)!r} could not be written: {error.strerror}. Free some space.") from error

    def _compare(self, expected: Mapping[str, Any]) -> None:
        assert self._header is not None
        differing = [key for key in expected if self._header.get(key) != expected[key]]
        if differing:
            pairs = [(key, _short(self._header.get(key)), _short(expected[key])) for key in differing]
            said = "; ".join(f"{key} was {before}, and is {now}" for key, before, now in pairs)
            raise InputError(f"{str(self.path)!r} holds measurements of another study: {said}. Choose another file.")


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights and buffers, of the pieces held here where it is sharded."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            digest.update(name.encode() + save({"": local.detach().contiguous()}))
    return digest.hexdigest()


def noting(data: Iterable[Any], digest: Any) -> Iterator[Any]:
    """Yield the batches of data, and take down in a hash what each of them holds."""
    for batch in data:
        for leaf in tree_leaves(as_dict(batch)):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                bits = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + save({"": bits}))
            elif isinstance(leaf, (str, int, float)):
                digest.update(repr(leaf).encode())
        yield batch


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:50]}… ({len(value)})"
