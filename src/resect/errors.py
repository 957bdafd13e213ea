"""The exceptions Resect raises: each message says what was wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResectError(Exception):
    """Base class of everything Resect raises on purpose."""


class InputError(ResectError, ValueError):
    """A value handed in is wrong: a name, a number, an option."""


class BlocksError(ResectError):
    """The residual blocks of a model could not be found, or do not belong to the model at hand."""


class AttachError(ResectError):
    """A gate or a method could not be attached to a model, or was used while not attached."""


class ProofError(ResectError):
    """Two models that had to be equal are not; nothing was returned or written."""


class FileError(ResectError):
    """A file is missing, damaged, or was not written by Resect."""


def quoted(names: Iterable[object], limit: int = 8) -> str:
    """``'a', 'b', … (+3 more)``: a list of names as error messages show it."""
    shown = [repr(str(name)) for name in names]
    more = f", … (+{len(shown) - limit} more)" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def unknown(what: str, name: object, valid: Iterable[str]) -> InputError:
    """The error for a name that does not exist, with the nearest names that do.

    Returned, not raised, so that the caller's line is the one in the traceback.
    """
    known = list(valid)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    elif known:
        hint = f"Valid: {quoted(known)}."
    else:
        hint = "There are none."
    return InputError(f"Unknown {what} {str(name)!r}. {hint}")


def check_all(problems: Iterable[str], summary: str, error: type[ResectError] = InputError) -> None:
    """Raise one ``error`` that lists every problem; do nothing when there is none."""
    found = list(problems)
    if len(found) == 1:
        raise error(f"{summary}: {found[0]}")
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found)
        raise error(f"{summary}: {len(found)} problems{lines}")
