"""Where ``resect shrink`` is to write, and all that speaks against it, told before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from resect.errors import InputError, ResectError, quoted
from resect.files import check_place
from resect.integrations.export import format_of
from resect.lab import checkpoint
from resect.lab.scratch import scratch_folder
from resect.lab.shrink.report import OWN

_UNFINISHED = (f"{checkpoint.PREFIX}*", f".{checkpoint.PREFIX}*")


def unfinished_folder(cut: Path) -> Path:
    """Where a recovery that was stopped is kept: beside the cut model."""
    return cut.with_name(f"{cut.name}-unfinished")


def written(
    out: Path | None, export: Path | None, report: Path | None, *, scratch: bool, recover: bool, resume: bool
) -> Iterator[str]:
    """Say what is wrong with the places to write to."""
    places = {"--out": out, "--report": report, "--export": export}
    given = {option: place for option, place in places.items() if place is not None}
    if "--out" not in given:
        yield "Where shall the cut model go? Give --out FOLDER, or --dry-run to see what to expect."
    for option, place in given.items():
        above = next(folder for folder in place.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            yield f"{option}: {place} cannot be written, as {above} is no folder that may be written to."
    yield from _mixed(given)
    if report is not None and report != out:
        yield from _told("--report", report, OWN)
    if out is not None:
        yield from _out(out, scratch, recover, resume)


def _mixed(given: dict[str, Path]) -> Iterator[str]:
    """Say which of the places lie in one another: a folder appears whole, or not at all."""
    for option, place in given.items():
        for other, folder in given.items():
            if option < other and place == folder:
                yield f"{other} {folder} is {option}, too: give each a place of its own."
            elif option != other and place != folder and place.absolute().is_relative_to(folder.absolute()):
                yield f"{option} {place} lies in {other} {folder}: give each a place of its own."


def _out(out: Path, scratch: bool, recover: bool, resume: bool) -> Iterator[str]:
    there = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    kinds = {"recipe.json": "a run", "plan.json": "a cut model"}
    held = next((kind for name, kind in kinds.items() if name in there), quoted(there, 3))
    if there or out.is_file():
        yield f"--out: {out} {f'holds {held} already' if there else 'is a file'}: choose another folder, or delete it."
    else:
        yield from _told("--out", out, ())
    if not out.name:  # the folder that one is in: nothing goes beside it
        return
    if scratch and scratch_folder(out).exists():
        yield f"--from-scratch: {scratch_folder(out)} is there already: choose another --out, or delete it."
    if not recover:
        return
    kept = unfinished_folder(out)
    yield from _told("--recover", kept, _UNFINISHED)
    if not resume and checkpoint.newest(kept) is not None:
        yield f"{kept} holds a recovery that was stopped: go on with --resume, choose another --out, or delete it."


def export_mistakes(export: Path | None) -> Iterator[str]:
    """Say what is wrong with the file to export to."""
    try:
        if export is not None:
            format_of(export)
            if export.is_dir():
                raise InputError(f"{str(export)!r} is a folder. Name a file.")
    except ResectError as error:
        yield f"--export: {error}"


def _told(option: str, place: Path, own: tuple[str, ...]) -> Iterator[str]:
    try:
        check_place(place, own)
    except ResectError as error:
        yield f"{option}: {error}"
