"""Encoded images into uint8 tensors, by a pool of threads."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from resect.errors import FileError, InputError
from resect.lab.data.rows import Columns

CHUNK = 256  # images a thread takes at a time
MEMORY_SHARE = 0.8  # of what is available now, for one split; the rest is for the training
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # tried in this order: trying all takes twice as long
TOO_DEEP = ("I", "F")  # modes of more than 8 bits a channel, which a conversion would cut off or saturate


def decode(rows: Any, columns: Columns, *, size: int | None, channels: int, place: str) -> Tensor:
    """The images of a table, in order: uint8 (N, channels, H, W).

    Raises:
        FileError: an image that cannot be decoded, with its number.
        InputError: images of unequal size and no ``size``, or more than fit into memory.
    """
    from PIL import Image

    def chunk(start: int) -> list[Any]:
        found: list[Any] = rows[start : start + CHUNK][columns.image]
        return found

    first = decode_image(chunk(0)[0], f"{place}, image 0", size=size, channels=channels)
    instead = 'Give a smaller data.options.size, or stream it from disk: data.name = "stream".'
    check_memory(len(rows) * first.numel(), place, instead)
    images = torch.empty(len(rows), *first.shape, dtype=torch.uint8)

    def decode_chunk(start: int) -> None:
        for number, cell in enumerate(chunk(start), start):
            image = decode_image(cell, f"{place}, image {number}", size=size, channels=channels)
            if image.shape != first.shape:
                (height, width), (high, wide) = first.shape[1:], image.shape[1:]
                raise InputError(
                    f"{place}: image 0 is {width}x{height}, image {number} is {wide}x{high} pixels. Give "
                    f"data.options.size: the shorter side becomes that long, and the centre is cut out."
                )
            images[number] = image

    Image.init()  # loading the decoders is not safe in several threads at once
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        for _ in pool.map(decode_chunk, range(0, len(rows), CHUNK)):
            pass
    return images


def open_image(cell: Any, place: str) -> Any:
    """The image in a cell of a table, ``{"bytes": …, "path": …}`` of which one may be None, in RGB.

    A grey image has its value in all three channels, transparency is laid over black, and a photo is
    turned upright as its camera says.

    Raises:
        FileError: it cannot be decoded, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        data = cell.get("bytes")
        with Image.open(io.BytesIO(data) if data is not None else cell["path"], formats=FORMATS) as image:
            if image.mode.startswith(TOO_DEEP):
                raise FileError(f"{place} has more than 8 bits a channel (mode {image.mode}). Convert it to 8 bits.")
            if image.format in ("JPEG", "MPO"):
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError, Image.DecompressionBombError) as error:
        raise FileError(f"{place} cannot be decoded ({type(error).__name__}). Fetch the file again.") from error


def decode_image(cell: Any, place: str, *, size: int | None = None, channels: int = 3) -> Tensor:
    """uint8 (channels, H, W), of ``size`` x ``size`` pixels where that is given: see `load`."""
    import numpy
    from PIL import Image, ImageOps

    image = open_image(cell, place)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    if channels == 1:
        image = image.convert("L")
    return torch.from_numpy(numpy.array(image)).view(image.height, image.width, channels).permute(2, 0, 1)


def check_memory(needed: int, place: str, instead: str) -> None:
    """Raise `InputError`, which says what to do ``instead``, if ``needed`` bytes are more than can be spared."""
    import psutil  # type: ignore[import-untyped]

    available = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * available:
        raise InputError(
            f"{place} takes {needed / 2**30:.1f} GiB decoded, and {available / 2**30:.1f} GiB of memory are free. "
            f"{instead}"
        )


def read_labels(rows: Any, columns: Columns, classes: int | None, place: str) -> Tensor:
    """The labels of a table, int64 (N,).

    Raises:
        FileError: there are none, or one is no class number below ``classes``.
    """
    labels = list(rows[columns.label])
    wrong = [label for label in labels if label is None or not 0 <= label < (classes or label + 1)]
    if wrong or not labels:
        limit = "0, 1, 2, …" if classes is None else f"0 … {classes - 1}"
        raise FileError(f"{place}: labels must be {limit}; found {wrong[:3] or 'none at all'}.")
    return torch.tensor(labels, dtype=torch.int64)
