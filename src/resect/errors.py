"""The exceptions Resect raises: each message says what was wrong, where, and what to do next."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any


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


class ExportError(ResectError):
    """A model, or an operation in it, cannot be exported."""


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
    known = list(dict.fromkeys(valid))
    near = nearest(str(name), known)
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    elif known:
        hint = f"Valid: {quoted(known, 8 if len(known) < 50 else 4)}."
    else:
        hint = "There are none."
    return InputError(f"Unknown {what} {str(name)!r}. {hint}")


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names that ``name`` probably means, the likeliest first; [] where none is near.

    Case, punctuation and a library's ``timm:`` do not count. A name that differs in nothing else is meant alone; else
    those that begin with it, the shortest first; else those spelt alike.
    """

    def bare(text: str) -> str:
        return re.sub(r"[\W_]+", "", text.lower())

    names = list(known)
    library = name.partition(":")[0] + ":"
    prefix = library if all(other.startswith(library) for other in names) else ""
    owners = "/" not in name  # a block may be named by its owner, without what follows the slash
    plain = {other: bare(other.removeprefix(prefix).partition("/" if owners else "\0")[0]) for other in names}
    wanted = bare(name.removeprefix(prefix))
    if len(wanted) < 2:
        return []
    same = [other for other, text in plain.items() if text == wanted]
    begun = [other for other, text in plain.items() if len(wanted) > 2 and text.startswith(wanted)]
    if same or begun:
        return (same or sorted(begun, key=len))[:limit]
    alike = difflib.get_close_matches(wanted, list(dict.fromkeys(plain.values())), n=20, cutoff=0.65)
    ratio = {text: round(difflib.SequenceMatcher(None, text, wanted).ratio(), 2) for text in alike}
    # Names of one stage begin alike; the second and third only where they are nearly as near as the first.
    good = sorted(alike, key=lambda text: (ratio[text], _begin_alike(text, wanted)), reverse=True)
    good = [text for text in good if ratio[text] > ratio[good[0]] - 0.08]
    return [other for text in good for other in names if plain[other] == text][:limit]


def _begin_alike(one: str, other: str) -> int:
    return sum(itertools.accumulate((a == b for a, b in zip(one, other, strict=False)), min))


def check_all(
    problems: Iterable[str], summary: str, error: type[ResectError] = InputError, limit: int | None = None
) -> None:
    """Raise one ``error`` that lists every problem, or the first ``limit``; do nothing when there is none."""
    found = list(problems)
    if len(found) == 1:
        raise error(f"{summary}: {found[0]}")
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found[:limit])
        lines += f"\n  … and {len(found) - limit} more" if limit is not None and len(found) > limit else ""
        raise error(f"{summary}: {len(found)} problems{lines}")


def check_counts(**counts: tuple[Any, int]) -> None:
    """Raise ``InputError`` unless each value is a whole number of at least its minimum: ``check_counts(n=(n, 1))``."""
    for name, (value, low) in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
            raise InputError(f"{name} must be a whole number of at least {low}, not {value!r}.")
