"""Files and folders that appear whole or not at all, and tensors that are checked when they are read."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from resect.errors import FileError, quoted

# What the place to write to can be blamed for; any other OSError comes from the work itself.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG})


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; on any failure the old file stays as it was."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step; on any failure the old file stays as it was."""
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary path)`` make a file, then move it into place in one step.

    Raises ``FileError`` when the disk is full or the place cannot be written; nothing is left behind.
    """
    _make_parent(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path, own: Sequence[str]) -> None:
    """Raise ``FileError`` where no folder can be put: a file, or a folder with more in it than the patterns ``own``."""
    if path.exists() and not path.is_dir():
        raise FileError(f"{str(path)!r} is a file. Choose another place.")
    if Path.cwd().is_relative_to(path.resolve()):
        raise FileError(f"{str(path)!r} is the folder that you are in, or one above it. Name one inside it.")
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in there if not any(fnmatch.fnmatchcase(name, pattern) for pattern in own)]
    if foreign:
        raise FileError(
            f"{str(path)!r} holds {quoted(foreign)}, not written here. Choose another place or an empty one."
        )


@contextmanager
def whole_folder(path: Path, own: Sequence[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes the place of ``path`` only if the body succeeds.

    ``own`` are patterns of the names it may hold: a folder with anything else in it is not replaced.
    """
    check_place(path, own)
    path = path.resolve()  # a link stays one
    _make_parent(path)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _not_written(path, error) from error
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        said = error if isinstance(error, OSError) else _os_error(error)
        if said.errno in _DISK:
            raise _not_written(path, said) from error
        raise
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def files_beside(target: Path) -> Iterator[Path]:
    """Give a temporary folder; only if the body succeeds its files move beside ``target``, that one last."""
    if target.is_dir():
        raise FileError(f"{str(target)!r} is a folder. Name a file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise _not_written(target, error) from error
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
            _sync(file)
            os.replace(file, target.parent / file.name)
    except OSError as error:
        if error.errno in _DISK:
            raise _not_written(target, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file whose SHA-256 is known.

    Raises ``FileError`` if the file is missing, truncated, or not the one that was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise FileError(f"{str(path)!r} is damaged: its SHA-256 is not the recorded one. Copy or make it again.")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise FileError(f"{str(path)!r} is not a safetensors file: {error}.") from error


def refuse_pickle(path: Path) -> None:
    """Raise ``FileError`` if a file is a pickle, or a folder holds such weights alone; say how to make safetensors.

    A pickle can run any code when it is read. It is known by its first bytes; that of ``torch.save`` is in an archive.
    """
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    if any(file.suffix == ".safetensors" for file in files):
        return
    for file in filter(_is_pickle, files):
        raise FileError(
            f"{str(file)!r} is a pickle, which can run any code when it is read, so Resect reads none. Make "
            "safetensors of its weights:\n"
            f"  model.load_state_dict(torch.load({str(file)!r}, weights_only=True))\n"
            "  safetensors.torch.save_model(model, 'model.safetensors')\n"
            "A cut model is written by resect.save(small, FOLDER), in the program that has it."
        )


def _is_pickle(file: Path) -> bool:
    if not file.is_file():
        return False
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") and name.count("/") == 1 for name in archive.namelist())
    with file.open("rb") as opened:
        begins = opened.read(2)
    return begins[:1] == b"\x80" and begins[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _os_error(error: SafetensorError) -> OSError:
    """Return what the system said to safetensors, which has it in words alone: "… (os error 28)", "Os { code: 28"."""
    found = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
    number = int(found[1] or found[2]) if found else 0
    return OSError(number, os.strerror(number))


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # something in the way is a file
        raise FileError(f"Cannot write {str(path)!r}: {str(path.parent)!r} is not a folder.") from error


def _sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a power cut cannot leave a renamed but empty one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _not_written(path: Path, error: OSError) -> FileError:
    return FileError(f"Cannot write {str(path)!r}: {error.strerror or error}. What was there before is unchanged.")
