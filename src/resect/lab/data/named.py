"""The data sets by name: `open_data`, and one small function for each name, whose parameters are its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, validate_call

from resect.errors import InputError, check_all, unknown
from resect.lab.data import rows as tables
from resect.lab.data.decode import decode, read_labels
from resect.lab.data.images import ImageData, Split
from resect.lab.data.stream import StreamedData, load_imagenet, load_stream

Pixels = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Paths = str | list[str]

DEFAULT_TEST_SHARE = 0.1


def open_data(name: str, **options: Any) -> ImageData | StreamedData:
    """The data set ``name``; all but the last two are decoded at once and stay in memory as uint8 tensors.

    ========  ========================================  =======================================================
    name      images                                    options
    ========  ========================================  =======================================================
    digits    1x8x8, 10 classes                         ``folds`` ``fold``
    cifar10   3x32x32, 10 classes                       ``path``
    cifar100  3x32x32, 100 classes                      ``path``
    svhn      3x32x32, 10 classes                       ``path`` ``extra``
    hub       any set on the hub                        ``dataset`` ``config`` + columns + splits + pixels
    parquet   parquet files                             ``path`` + columns + splits + pixels
    folder    a folder of images, one folder a class    ``path`` ``test`` ``test_share`` + pixels
    imagenet  ImageNet-1k, streamed                     ``path`` + streaming
    stream    any of the above three, streamed          ``dataset`` ``config`` ``path`` ``image`` ``label``
                                                        ``train`` ``test`` ``images`` ``classes`` + streaming
    ========  ========================================  =======================================================

    Columns: ``image`` and ``label``; splits: ``train``, ``test``, and ``test_share`` where there is no test
    split: see `load_hub`. Pixels: ``size`` and ``channels``: see `load_hub`. Streaming: see `load_stream`.

    Raises:
        InputError: an unknown name, every unknown option and wrong value, or data that cannot be fetched.
        FileError: a file that is missing, damaged, or does not hold such images.
    """
    if name not in LOADERS:
        raise unknown("data", name, LOADERS)
    loader = LOADERS[name]
    try:
        data: ImageData | StreamedData = validate_call(config=ConfigDict(strict=True))(loader)(**options)
    except ValidationError as error:
        valid = [option for option in loader.__annotations__ if option != "return"]
        check_all(sorted({_problem(entry, valid) for entry in error.errors()}), f"Data {name!r}")
        raise  # not reached: a validation error has at least one entry
    return data


def load(name: str, **options: Any) -> ImageData:
    """`open_data`, for callers that want all images in memory.

    Raises:
        InputError: as there, and for the names of streamed data.
        FileError: as there.
    """
    data = open_data(name, **options)
    if isinstance(data, StreamedData):
        raise InputError(f"Data {name!r} is streamed, and this needs all images in memory.")
    return data


def load_digits(folds: Annotated[int, Field(ge=2, le=100)] = 5, fold: Annotated[int, Field(ge=0)] = 0) -> ImageData:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels, which ship with the package.

    The scans hold whole numbers 0 … 16; the uint8 pixel is that number times 15, so ``image // 15`` is the
    scan again. Of ``folds`` (default 5) stratified parts, always the same ones, part ``fold`` (default 0)
    is the test split.
    """
    if fold >= folds:
        raise InputError(f"Data 'digits': fold must be 0 … folds - 1, not folds={folds}, fold={fold}.")
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import StratifiedKFold

    scans = load_scans()
    images = torch.from_numpy((scans.images * 15).astype("uint8"))[:, None]
    labels = torch.from_numpy(scans.target.astype("int64"))
    parts = StratifiedKFold(folds, shuffle=True, random_state=0).split(scans.images, scans.target)
    train, test = (torch.from_numpy(part) for part in list(parts)[fold])
    return ImageData(
        "digits",
        Split(images[train].contiguous(), labels[train]),
        Split(images[test].contiguous(), labels[test]),
        tuple("0123456789"),
    )


def load_cifar10(path: Paths | None = None) -> ImageData:
    """CIFAR-10: 50,000 and 10,000 images of 3x32x32.

    ``path``: parquet files as the hub has them (train.parquet, test.parquet; see `load_parquet`); without it
    (default) the `datasets` library fetches ``uoft-cs/cifar10`` once and keeps it.
    """
    return _tables("cifar10", _files_or_hub(path, "uoft-cs/cifar10"), count=10)


def load_cifar100(path: Paths | None = None) -> ImageData:
    """CIFAR-100 with its 100 fine classes: 50,000 and 10,000 images of 3x32x32; ``path`` as in `load_cifar10`."""
    return _tables("cifar100", _files_or_hub(path, "uoft-cs/cifar100"), label="fine_label", count=100)


def load_svhn(path: Paths | None = None, extra: bool = False) -> ImageData:
    """Street view house numbers: 73,257 and 26,032 cropped digits of 3x32x32; ``path`` as in `load_cifar10`.

    With ``extra`` (default no) the 531,131 easier images of the split "extra" are trained on as well.
    """
    import datasets

    splits = _files_or_hub(path, "ufldl-stanford/svhn", "cropped_digits")
    if extra:
        parts = [tables.pick(splits, name, None, "svhn")[0] for name in ("train", "extra")]
        splits = splits | {"train": datasets.concatenate_datasets(parts)}
    return _tables("svhn", splits, count=10)


def load_hub(
    dataset: str,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = None,
    test_share: Share | None = None,
    size: Pixels | None = None,
    channels: Literal[1, 3] = 3,
) -> ImageData:
    """Any image set on the hub.

    Args:
        dataset: its name there, such as ``zalando-datasets/fashion_mnist``.
        config: which of its configurations, where it has several.
        image, label: its columns (default: the only one of images, and the only one of classes, else of
            whole numbers).
        train, test: its splits (default: train, and the first there is of test, validation, valid, val, dev).
        test_share: without a test split, this stratified share of the training images, always the same ones
            (default 0.1).
        size: the shorter side of every image becomes that long, and the centre is cut out (default: as they
            are, all of one size).
        channels: 3 (default): grey images get their value in all three, transparency is laid over black;
            1: colours become grey.
    """
    splits = tables.from_hub(dataset, config)
    return _tables(dataset, splits, image, label, train, test, test_share, size, channels)


def load_parquet(
    path: Paths,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = None,
    test_share: Share | None = None,
    size: Pixels | None = None,
    channels: Literal[1, 3] = 3,
) -> ImageData:
    """Parquet files with a column of encoded images; the options of `load_hub`.

    ``path`` is a folder, a file, or a list of files. A file belongs to the split with which its name, or that
    of its folder, begins (test.parquet, validation-00000-of-00002.parquet, val/0.parquet), else to train.
    Labels without names are whole numbers; there are as many classes as the highest one says.
    """
    splits = tables.from_parquet(path)
    return _tables(_place(path), splits, image, label, train, test, test_share, size, channels)


def load_folder(
    path: str,
    test: str | None = None,
    test_share: Share | None = None,
    size: Pixels | None = None,
    channels: Literal[1, 3] = 3,
) -> ImageData:
    """A folder of images: train/CLASS/… and test/CLASS/… (or val, …), or CLASS/… alone; options of `load_hub`."""
    return _tables(path, tables.from_folder(path), test=test, test_share=test_share, size=size, channels=channels)


LOADERS: dict[str, Callable[..., Any]] = {
    "digits": load_digits,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "svhn": load_svhn,
    "hub": load_hub,
    "parquet": load_parquet,
    "folder": load_folder,
    "imagenet": load_imagenet,
    "stream": load_stream,
}


def _tables(
    place: str,
    splits: tables.Splits,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = None,
    test_share: float | None = None,
    size: int | None = None,
    channels: int = 3,
    count: int | None = None,
) -> ImageData:
    """Two splits of a table, decoded; ``count`` is the number of classes, where it is known beforehand."""
    train_rows, test_rows = tables.pick(splits, train, test, place)
    if test_rows is not None and test_share is not None:
        raise InputError(f"{place} has a test split: data.options.test_share is for data without one.")
    if test_rows is None:
        columns = tables.find_columns(train_rows, image, label, place)
        train_rows, test_rows = _stratified(train_rows, columns, test_share or DEFAULT_TEST_SHARE, place)
    parts = []
    for split, rows in (("train", train_rows), ("test", test_rows)):
        where = f"{place} ({split})"
        columns = tables.find_columns(rows, image, label, where)
        limit = len(columns.classes) if columns.classes else count
        parts.append((tables.encoded(rows, columns), columns, read_labels(rows, columns, limit, where), where))
    names = parts[0][1].classes
    highest = max(int(labels.max()) for _, _, labels, _ in parts)
    if names is None:
        names = tuple(map(str, range(count or highest + 1)))
    if highest >= len(names) or parts[1][1].classes not in (None, names):
        raise InputError(f"{place}: the two splits do not have the same classes.")
    both = [
        Split(decode(rows, columns, size=size, channels=channels, place=where), labels)
        for rows, columns, labels, where in parts
    ]
    if both[0].images.shape[1:] != both[1].images.shape[1:]:
        shapes = " and ".join(str(tuple(part.images.shape[1:])) for part in both)
        raise InputError(f"{place}: training and test images are of shapes {shapes}. Give data.options.size.")
    return ImageData(place, both[0], both[1], names)


def _stratified(rows: Any, columns: tables.Columns, share: float, place: str) -> tuple[Any, Any]:
    from sklearn.model_selection import train_test_split

    labels = read_labels(rows, columns, None, place)
    try:
        kept, held = train_test_split(range(len(labels)), test_size=share, stratify=labels, random_state=0)
    except ValueError as error:
        raise InputError(f"{place} has no test split, and none can be taken: {tables.said(error)}.") from error
    return rows.select(sorted(kept)), rows.select(sorted(held))


def _files_or_hub(path: Paths | None, dataset: str, config: str | None = None) -> tables.Splits:
    return tables.from_hub(dataset, config) if path is None else tables.from_parquet(path)


def _place(path: Paths) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _problem(entry: Any, valid: list[str]) -> str:
    """One entry of pydantic's list as a sentence about the option."""
    option = entry["loc"][0]
    if entry["type"] == "unexpected_keyword_argument":
        return str(unknown("option", option, valid))
    if entry["type"] == "missing_argument":
        return f"the option {option!r} must be given"
    return f"{option}: {entry['msg'].lower()}, not {entry['input']!r}"
