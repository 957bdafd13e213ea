"""Data as they are named on the command line: by a name that recipes know, a path, or a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resect.errors import FileError, ResectError, unknown
from resect.lab.data.named import LOADERS, open_data
from resect.lab.data.source import Data


def data_by_name(name: str, options: Mapping[str, Any]) -> Data:
    """Open ``digits``, ``cifar100`` and whatever else recipes call by name; a path; or ``OWNER/NAME`` on the hub.

    A path is a parquet file, a folder with some, or a folder of images (train/CLASS/…, or CLASS/… alone). ``options``
    are those of `open_data`.

    Raises
    ------
    InputError, FileError: as `open_data`, in the words of the command line; or nothing is at a path.
    """
    kind, more = _meant(name)
    try:
        return open_data(kind, **more, **options)
    except ResectError as error:
        said = re.sub(r"data\.options\.(\w+)", r"-d \1=…", str(error))
        raise type(error)(re.sub(r"data\.name = \"(\w+)\"", r"--data \1", said)) from error


def _meant(name: str) -> tuple[str, dict[str, Any]]:
    """The name that recipes use, and the option that says which."""
    path = Path(name)
    if name in LOADERS:
        return name, {}
    if path.is_dir():
        return ("parquet" if any(path.rglob("*.parquet")) else "folder"), {"path": name}
    if path.is_file():
        if path.suffix != ".parquet":
            raise FileError(f"{name!r} is no parquet file. Data are parquet files, folders of images, or text:FILE.")
        return "parquet", {"path": name}
    if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not path.suffix:
        return "hub", {"dataset": name}
    if "/" in name or path.suffix:
        raise FileError(f"There is nothing at {name!r}. A data set of the hub is OWNER/NAME.")
    raise unknown("data", name, [*LOADERS, "text:FILE"])
