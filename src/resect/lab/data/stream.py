"""Images read from disk or from the hub while a net trains, through timm's transforms: ImageNet and the like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from resect.errors import FileError, InputError
from resect.lab.data import rows as tables
from resect.lab.data.decode import check_memory, open_image
from resect.lab.data.images import normalize

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class StreamedData:
    """One data set that is read while it is used; ``train`` and ``test`` are tables of encoded images."""

    name: str
    train: Any  # datasets.Dataset of a folder, else datasets.IterableDataset
    test: Any
    columns: tables.Columns
    classes: tuple[str, ...]
    images: int  # in an epoch
    size: int
    crop: float
    workers: int
    buffer: int
    erase: float
    augment: Mapping[str, Any] = field(default_factory=dict)  # for timm's create_transform

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return 3, self.size, self.size

    @property
    def stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel in pixel units: those of ImageNet, whatever the images."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        return 255 * torch.tensor(IMAGENET_DEFAULT_MEAN), 255 * torch.tensor(IMAGENET_DEFAULT_STD)

    def transform(self, training: bool) -> Any:
        """From a PIL image to a uint8 tensor (C, H, W)."""
        from timm.data import create_transform

        more = self.augment if training else {"crop_pct": self.crop}
        return create_transform(input_size=self.size, is_training=training, normalize=False, **more)

    def sample(self, which: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """The first ``limit`` images of the split "train" or "test", cut as for testing, normalised; their labels."""
        rows = list(itertools.islice(getattr(self, which), limit))
        check_memory(4 * len(rows) * math.prod(self.shape), f"{self.name} ({which})", "Use fewer images.")
        images, labels = self.decode(rows, self.transform(False))
        return normalize(images, *self.stats), labels

    def decode(self, rows: list[Any], transform: Any) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, C, H, W) and labels int64 (N,) of some rows.

        Raises:
            FileError: an image that cannot be decoded, or a label that is no class.
        """
        labels = [row[self.columns.label] for row in rows]
        wrong = [label for label in labels if label is None or not 0 <= label < len(self.classes)]
        if wrong:
            raise FileError(f"{self.name}: labels must be 0 … {len(self.classes) - 1}; found {wrong[:3]}.")
        cells = [row[self.columns.image] for row in rows]
        images = [transform(open_image(cell, f"{self.name}, image {cell['path'] or ''}".strip())) for cell in cells]
        return torch.stack(images), torch.tensor(labels)


def load_stream(
    dataset: str | None = None,
    config: str | None = None,
    path: str | list[str] | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = None,
    images: Annotated[int, Field(ge=1)] | None = None,
    classes: Annotated[int, Field(ge=2)] | None = None,
    size: Annotated[int, Field(ge=8)] = 224,
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875,
    flip: Share = 0.5,
    color_jitter: Share = 0.4,
    auto_augment: str | None = None,
    erase: Share = 0.0,
    workers: Annotated[int, Field(ge=0)] = 4,
    buffer: Annotated[int, Field(ge=1)] = 1000,
) -> StreamedData:
    """A data set too large for memory, read while it is used.

    Args:
        dataset, config: a set on the hub, or
        path: parquet files (as in `load_parquet`) or a folder of images (as in `load_folder`).
        image, label, train, test: as in `load_hub`; a test split there must be.
        images: how many training images are an epoch (default: all; must be given where the hub does not say).
        classes: how many there are, where the labels are numbers without names.
        size: of the square that the net sees.
        crop: the share of the shorter side that this square is of a test image.
        flip, color_jitter, auto_augment: of timm's ``create_transform`` (timm's defaults), after its
            RandomResizedCrop. ``auto_augment`` is for instance "rand-m9-mstd0.5", and replaces the colour jitter.
        erase: the probability that a rectangle of a training image is erased.
        workers: processes that decode; the order depends on their number. 0: in the training process.
        buffer: encoded images among which a worker picks the next one at random, where the data are parquet
            files. Rows sorted by class want a larger one; images in a folder are shuffled as a whole.
    """
    if (dataset is None) == (path is None):
        raise InputError("Streamed data are either data.options.dataset, a name on the hub, or data.options.path.")
    name = dataset or (path if isinstance(path, str) else ", ".join(path or []))
    splits = _open(dataset, config, path)
    train_rows, test_rows = tables.pick(splits, train, test, name)
    if test_rows is None:
        raise InputError(f"{name} has no test split. Name one of its splits with data.options.test.")
    columns = tables.find_columns(train_rows, image, label, name)
    if columns.classes is None and classes is None:
        raise InputError(f"{name}: the labels have no names. Say how many classes there are: data.options.classes.")
    return StreamedData(
        name,
        tables.encoded(train_rows, columns),
        tables.encoded(test_rows, columns),
        columns,
        columns.classes or tuple(map(str, range(classes or 0))),
        images or _count(train_rows, path, train, name),
        size,
        crop,
        workers,
        buffer,
        erase,
        {"hflip": flip, "color_jitter": color_jitter or None, "auto_augment": auto_augment},
    )


def load_imagenet(
    path: str | list[str] | None = None,
    size: Annotated[int, Field(ge=8)] = 224,
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875,
    flip: Share = 0.5,
    color_jitter: Share = 0.4,
    auto_augment: str | None = None,
    erase: Share = 0.0,
    workers: Annotated[int, Field(ge=0)] = 4,
    buffer: Annotated[int, Field(ge=1)] = 1000,
) -> StreamedData:
    """ImageNet-1k: 1,281,167 images to train on and 50,000 to test on, 1,000 classes; the options of `load_stream`.

    ``path`` is a folder train/CLASS/…, val/CLASS/…, or parquet files; without it (default) ``ILSVRC/imagenet-1k``
    is read from the hub, which wants a login (``hf auth login``). Its split test has no labels: val is tested on.
    """
    dataset = "ILSVRC/imagenet-1k" if path is None else None
    return load_stream(
        dataset,
        path=path,
        test="validation" if path is None else None,
        size=size,
        crop=crop,
        flip=flip,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        erase=erase,
        workers=workers,
        buffer=buffer,
    )


def _open(dataset: str | None, config: str | None, path: str | list[str] | None) -> tables.Splits:
    if path is None:
        return tables.from_hub(str(dataset), config, streaming=True)
    if isinstance(path, str) and Path(path).is_dir() and not any(Path(path).rglob("*.parquet")):
        return tables.from_folder(path)
    splits = tables.from_parquet(path, streaming=True)
    return {name: rows.reshard() for name, rows in splits.items()}  # a row group each: many even parts to share out


def _count(rows: Any, path: str | list[str] | None, split: str, name: str) -> int:
    if is_table(rows):
        return len(rows)
    if path is not None:
        return tables.count_parquet(path, split)
    known = (rows.info.splits or {}).get(split)
    if known is None or not known.num_examples:
        raise InputError(f"{name} does not say how many images its split {split!r} has: give data.options.images.")
    return int(known.num_examples)


def is_table(rows: Any) -> bool:
    """Whether the rows can be had in any order (`datasets.Dataset`), or only one after the other."""
    import datasets

    return isinstance(rows, datasets.Dataset)
