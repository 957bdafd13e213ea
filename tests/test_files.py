"""Files and folders are whole or absent, whatever fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from resect import files
from resect.errors import FileError

pytestmark = pytest.mark.core


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    files.write_text(path, "new")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"Cannot write .*No space left on device.*unchanged"):
        files.write_text(path, "newer")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write(folder, text):
    with files.whole_folder(folder, own=("mark",)) as work:
        (work / "mark").write_text(text)


def test_a_folder_is_replaced_or_stays(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    write(folder, "old")
    write(folder, "new")
    assert (folder / "mark").read_text() == "new"
    with pytest.raises(ZeroDivisionError), files.whole_folder(folder, own=("mark",)) as work:
        print(1 // 0, file=(work / "mark").open("w"))
    assert (folder / "mark").read_text() == "new"
    replace, calls = os.replace, []

    def second_fails(*paths):
        calls.append(paths)
        if len(calls) == 2:
            full()
        replace(*paths)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(FileError, match="No space left"):
        write(folder, "newer")
    assert (folder / "mark").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_somebody_elses_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("work")
    with pytest.raises(FileError, match=r"holds 'a\.tex', not written here"):
        write(tmp_path / "thesis", "x")
    assert (tmp_path / "thesis" / "a.tex").exists()


def test_an_error_of_the_work_itself_is_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError), files.whole_folder(tmp_path / "out", own=("mark",)):
        (tmp_path / "nowhere").read_text()
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is not a folder"):
        files.write_text(tmp_path / "file" / "a.json", "x")
    with pytest.raises(FileError, match="is not a folder"):
        write(tmp_path / "file" / "out", "x")


def test_a_folder_that_one_is_in_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (".", "..", tmp_path / "here"):
        with pytest.raises(FileError, match="is the folder that you are in"), files.whole_folder(Path(place), own=()):
            raise AssertionError
    assert (tmp_path / "here" / "below").is_dir()


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with files.whole_folder(tmp_path / "out", own=("mark",)) as work:
        (work / "mark").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "mark").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
