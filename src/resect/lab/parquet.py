"""Encoded images in parquet tables (the hub's layout: img, label) into uint8 tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resect.errors import FileError, InputError

Rows = tuple[list[bytes], list[int]]  # encoded images, labels


def read_folder(path: str) -> Iterator[tuple[Rows, str]]:
    """The rows of train.parquet and of test.parquet in the folder ``path``, each with where it came from.

    Raises:
        FileError: a file is missing, is not a whole parquet file, or lacks the columns img and label.
    """
    import pyarrow as arrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    files = [Path(path) / f"{split}.parquet" for split in ("train", "test")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileError(f"No file {' and no file '.join(missing)}: data.options.path must name their folder.")
    for file in files:
        try:
            columns = parquet.read_schema(file).names
            if {"img", "label"} - set(columns):
                raise FileError(f"{file} has no columns img and label, but {columns}.")
            table = parquet.read_table(file, columns=["img", "label"])
            images = [image["bytes"] for image in table.column("img").to_pylist()]
            yield (images, table.column("label").to_pylist()), str(file)
        except (arrow.ArrowException, OSError, KeyError, TypeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise FileError(f"{file} is not a whole parquet file of images: {said}. Fetch it again.") from error


def read_hub(name: str) -> Iterator[tuple[Rows, str]]:
    """The rows of both splits of the hub's data set ``name``.

    Raises:
        InputError: it could not be fetched.
    """
    import datasets

    try:
        both: Any = datasets.load_dataset(name)
    except Exception as error:  # the library lets errors of half a dozen network packages through
        raise InputError(
            f"Data {name!r} could not be fetched ({type(error).__name__}). Check the network, or give "
            "data.options.path, a folder with train.parquet and test.parquet."
        ) from error
    for split in ("train", "test"):
        rows = both[split].cast_column("img", datasets.Image(decode=False))
        yield ([image["bytes"] for image in rows["img"]], list(rows["label"])), f"{name} ({split})"


def decode(rows: Rows, *, shape: tuple[int, int, int], classes: int, place: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, *shape) and labels int64 (N,).

    Raises:
        FileError: an image that cannot be decoded or has another size, or a label that is no class.
    """
    encoded, labels = rows
    images = torch.empty(len(encoded), *shape, dtype=torch.uint8)

    def decode_one(index: int) -> None:
        images[index] = _decode_image(encoded[index], shape, f"{place}, image {index}")

    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        for _ in pool.map(decode_one, range(len(encoded))):
            pass
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
    if wrong or not labels:
        raise FileError(f"{place}: labels must be 0 … {classes - 1}; found {wrong[:3] or 'none at all'}.")
    return images, torch.tensor(labels, dtype=torch.int64)


def _decode_image(encoded: bytes, shape: tuple[int, int, int], place: str) -> Tensor:
    import numpy
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = numpy.array(image.convert("RGB"))
    except (OSError, TypeError, ValueError, SyntaxError) as error:
        raise FileError(f"{place} cannot be decoded ({type(error).__name__}). Fetch the file again.") from error
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    if tuple(tensor.shape) != shape:
        raise FileError(f"{place} has shape {tuple(tensor.shape)}, not {shape}.")
    return tensor
