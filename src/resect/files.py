"""Write files and folders so that they appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resect.errors import FileError


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; on any failure the old file stays as it was."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary path)`` make a file, then move it into place in one step.

    Raises ``FileError`` when the disk is full or the place cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. The old file, if any, is unchanged."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes the place of ``path`` only if the body succeeds.

    Only a folder that is empty or was written by Resect before (it holds ``plan.json``) is replaced.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / "plan.json").exists())):
        raise FileError(
            f"{str(path)!r} exists and was not written by Resect; choose another place, or remove it first."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise FileError(f"Cannot write {str(path)!r}: {error.strerror or error}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_suffix(".old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise FileError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. What was there is unchanged."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
