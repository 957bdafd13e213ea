"""Tables of encoded images by the `datasets` library: from the hub, from parquet files, from a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resect.errors import FileError, InputError, quoted, unknown

TEST_NAMES = ("test", "validation", "valid", "val", "dev")
KNOWN_SPLITS = ("train", "extra", *TEST_NAMES)

Splits = dict[str, Any]  # name -> datasets.Dataset or datasets.IterableDataset


@dataclass(frozen=True)
class Columns:
    """Where a table keeps its images and labels; ``classes`` are the labels' names, None if it has none."""

    image: str
    label: str
    classes: tuple[str, ...] | None


def from_hub(dataset: str, config: str | None = None, *, streaming: bool = False) -> Splits:
    """The splits of a data set on the hub; what was fetched once is kept by the library."""
    import datasets

    try:
        return dict(datasets.load_dataset(dataset, config, streaming=streaming))
    except Exception as error:  # the library lets errors of half a dozen network packages through
        name = dataset if config is None else f"{dataset} ({config})"
        raise InputError(
            f"Data {name!r} could not be fetched from the hub ({said(error)}). Check the name, its config "
            "and the network, or give local files with data.options.path."
        ) from error


def from_parquet(path: str | list[str], *, streaming: bool = False) -> Splits:
    """The splits in parquet files: a folder, a file, or a list of them.

    A file belongs to the split with which its name begins (train.parquet, validation-00000-of-00014.parquet),
    else the name of its folder (train/0.parquet); else it is training data.

    Raises:
        FileError: nothing there, or a file that is no whole parquet file.
    """
    import datasets

    files: dict[str, list[str]] = {}
    for file in _parquet_files([path] if isinstance(path, str) else path):
        _check_parquet(file)
        files.setdefault(_split_of(file), []).append(str(file))
    place = ", ".join(path) if isinstance(path, list) else path
    load = datasets.load_dataset
    return _local(lambda: load("parquet", data_files=files, streaming=streaming), place)


def from_folder(path: str) -> Splits:
    """The splits of a folder of images: train/CLASS/… and test/CLASS/…, or CLASS/… alone; paths, nothing decoded.

    Raises:
        FileError: nothing there.
    """
    import datasets

    root = _existing(path)
    names = [name for name in KNOWN_SPLITS if (root / name).is_dir()]
    folders = {name: root / name for name in names} if "train" in names else {"train": root}
    empty = [str(folder) for folder in folders.values() if not any(folder.glob("*/*"))]
    if empty:
        raise FileError(f"No images at {' and '.join(f'{folder}/CLASS/…' for folder in empty)}: one folder a class.")
    files = {name: f"{folder}/**" for name, folder in folders.items()}
    return _local(lambda: datasets.load_dataset("imagefolder", data_files=files, drop_labels=False), path)


def count_parquet(path: str | list[str], split: str) -> int:
    """The rows of one split of these files, from their footers."""
    from pyarrow import parquet

    files = _parquet_files([path] if isinstance(path, str) else path)
    return sum(parquet.read_metadata(file).num_rows for file in files if _split_of(file) == split)


def find_columns(rows: Any, image: str | None, label: str | None, place: str) -> Columns:
    """The columns with the images and the labels, where not given: the only ones whose features fit.

    Raises:
        InputError: none fits, several do, or there is no such column.
    """
    import datasets

    features = rows.features or {}

    def is_image(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)

    def is_class(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel)

    def is_number(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and "int" in feature.dtype

    image = _choose("image", image, features, [is_image], place)
    label = _choose("label", label, features, [is_class, is_number], place)
    names = features[label].names if is_class(features[label]) else None
    return Columns(image, label, None if names is None else tuple(names))


def encoded(rows: Any, columns: Columns) -> Any:
    """The same rows with these two columns alone, their images left as they are stored."""
    import datasets

    return rows.select_columns([columns.image, columns.label]).cast_column(columns.image, datasets.Image(decode=False))


def pick(splits: Splits, train: str, test: str | None, place: str) -> tuple[Any, Any | None]:
    """The training rows, and the test rows: ``test``, else the first of `TEST_NAMES` that there is, else None."""
    for name in (train, test):
        if name is not None and name not in splits:
            raise InputError(f"{place}: {unknown('split', name, splits)}")
    if test is None:
        test = next((name for name in TEST_NAMES if name in splits and name != train), None)
    return splits[train], None if test is None else splits[test]


def said(error: BaseException) -> str:
    """What an error of another library says, in half a sentence."""
    inner = error.__cause__ or error
    first = (str(inner).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(inner).__name__}: {first[:200]}" if first else type(inner).__name__


def _choose(what: str, given: str | None, features: Any, tests: Iterable[Callable[[Any], bool]], place: str) -> str:
    if given is not None:
        if given not in features:
            raise InputError(f"{place}: {unknown('column', given, features)}")
        if not any(test(features[given]) for test in tests):
            raise InputError(f"{place}: column {given!r} holds no {what}s but {features[given]}.")
        return given
    for test in tests:
        fitting = [name for name, feature in features.items() if test(feature)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InputError(f"{place}: {quoted(fitting)} could all be {what}s. Choose with data.options.{what}.")
    raise InputError(f"{place} has no column of {what}s, but {quoted(features)}.")


def _local(load: Callable[[], Any], place: str) -> Splits:
    import datasets

    datasets.disable_progress_bars()  # reading local files takes a moment: a bar would only run over ours
    try:
        return dict(load())
    except Exception as error:  # of datasets, pyarrow, fsspec and the system
        raise FileError(f"{place} cannot be read as a table of images ({said(error)}).") from error
    finally:
        datasets.enable_progress_bars()


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise FileError(f"There is nothing at {path}: data.options.path must name a folder or files.")
    return Path(path)


def _parquet_files(paths: list[str]) -> list[Path]:
    found = []
    for path in map(_existing, paths):
        inside = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not inside:
            raise FileError(f"There are no parquet files in {path}: data.options.path must name a folder or files.")
        found += inside
    return found


def _split_of(file: Path) -> str:
    for name in (file.name, file.parent.name):
        for split in KNOWN_SPLITS:
            if name.startswith(split):
                return split
    return "train"


def _check_parquet(file: Path) -> None:
    from pyarrow import ArrowException, parquet

    try:
        parquet.read_metadata(file)
    except (ArrowException, OSError) as error:
        raise FileError(f"{file} is not a whole parquet file ({said(error)}). Fetch it again.") from error
