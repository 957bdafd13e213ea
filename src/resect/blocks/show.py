"""Blocks as text for people: a summary, a table that fits the width at hand, refusals grouped by reason."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resect.blocks.block import Blocks, Refusal, ResidualBlock

ROWS = 100  # of a table that is printed from Python; the command shows them all
NO_TERMINAL = 120  # columns


@dataclass
class Column:
    """One column of the table: its head and its cells."""

    head: str
    cells: list[str]
    right: bool = False

    @property
    def width(self) -> int:
        """Width of the widest cell, the head included."""
        return max(map(len, (self.head, *self.cells)))


def summary(blocks: Blocks) -> str:
    """``24 residual blocks in 12 layers of VisionTransformer: attention, MLP``."""
    of = f" of {blocks.model}" if blocks.model else ""
    if not blocks and blocks.refused:
        return f"no residual block{of} can be controlled"
    if not blocks:
        return f"no residual blocks in {blocks.model}" if blocks.model else "no residual blocks"
    parts = list(dict.fromkeys(part_name(block.part) for block in blocks))
    kinds = f": {', '.join(parts)}" if len(parts) > 1 else ""
    return f"{count(len(blocks), 'residual block')} in {count(len(blocks.layers()), 'layer')}{of}{kinds}"


def line(block: ResidualBlock) -> str:
    """One block in one line: name, place, kind, branch, size, and what cannot be done with it."""
    facts = [
        f"residual block {block.index}",
        f"{block.shortcut} shortcut",
        f"{part_name(block.part)} branch ({' '.join(inside(block)) or 'functions on raw parameters'})",
        f"{block.parameters:,} parameters",
        *([f"{block.flops:,} FLOPs on the example"] if block.flops else []),
        *(f"cannot be {what}: {why}" if why else f"cannot be {what}" for what, why in limits(block)),
        *(["verified by structure alone"] if block.verified == "structure" else []),
    ]
    return f"{block.name}: {', '.join(facts)}"


def table(blocks: Blocks, width: int | None = None, rows: int | None = ROWS, heading: str = "") -> str:
    """The summary, a row per block, notes, and what was refused.

    Parameters
    ----------
    blocks: any ``Blocks``.
    width: columns of the terminal: names and modules are cut in their middle to fit, and where that is not
        enough the columns of least use go. None: the terminal's own (``COLUMNS`` where it is set, 120 where
        there is no terminal); 0: nothing is cut.
    rows: show at most this many blocks, the first and the last of them; None: all.
    heading: instead of the summary.
    """
    if width is None:
        width = shutil.get_terminal_size((NO_TERMINAL, 24)).columns
    shown = list(blocks)
    first = len(shown) if rows is None or len(shown) <= rows else rows - rows // 3
    last = 0 if first == len(shown) else len(shown) - rows // 3  # type: ignore[operator]
    if last:
        shown = shown[:first] + shown[last:]
    notes: list[str] = []
    grid = _grid(_columns(blocks, shown, notes), width, notes) if shown else []
    if last:
        grid.insert(first + 1, f"… {last - first} more …")
    below = [text for note in (*_abilities(blocks), *notes) for text in _wrap(note, width)]
    return "\n".join([*_wrap(heading or summary(blocks), width), *grid, *below, *refusals(blocks.refused, width)])


def refusals(refused: Sequence[Refusal], width: int = 0) -> list[str]:
    """Lines that list what was refused, equal reasons together; names inside a reason do not make it another."""
    if not refused:
        return []
    groups: dict[str, list[Refusal]] = {}
    for refusal in refused:
        groups.setdefault(re.sub(r"'[^']*'|\d+", "_", refusal.reason), []).append(refusal)
    lines = [f"{count(len(refused), 'residual addition')} refused:"]
    for group in groups.values():
        where = places(list(dict.fromkeys(refusal.where for refusal in group)))
        times = f" ({len(group)} ×)" if len(group) > 1 else ""
        lines += _wrap(f"  {where}{times}: {group[0].reason}", width)
    return lines


def inside(block: ResidualBlock) -> list[str]:
    """Return the branch's modules as named inside the block's owner."""
    return [name.removeprefix(f"{block.owner}.") for name in block.modules]


def limits(block: ResidualBlock) -> list[tuple[str, str]]:
    """Return what cannot be done with a block, and why: ``[("scaled", "functions follow …")]``."""
    able = {"closed": block.closable, "scaled": block.scalable, "removed": block.removable}
    return [(what, block.reason) for what, can in able.items() if not can]


def part_name(part: str) -> str:
    """``MLP`` for ``mlp``; the others as they are."""
    return {"mlp": "MLP"}.get(part, part)


def places(names: Sequence[str], limit: int = 3) -> str:
    """``a, b and c``, or ``a, b, … z`` where there are more than ``limit``."""
    if len(names) > limit:
        return f"{', '.join(names[: limit - 1])}, … {names[-1]}"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def count(number: int, noun: str) -> str:
    """``1 block``, ``1,024 blocks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cut(text: str, width: int) -> str:
    """Shorten a text to ``width`` characters by an ellipsis in its middle."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def cut_words(text: str, width: int) -> str:
    """Shorten a list of words to ``width`` characters by an ellipsis for those in its middle."""
    head, tail = text.split(" "), list[str]()
    while len(text) > width and len(head) + len(tail) > 2:
        if not tail:
            tail = [head.pop()]
        head.pop()
        text = " ".join([*head, "…", *tail])
    return cut(text, width)


def _columns(blocks: Blocks, shown: list[ResidualBlock], notes: list[str]) -> list[Column]:
    """Every column that says something about these blocks."""

    def column(head: str, cell: Callable[[ResidualBlock], str], right: bool = False) -> Column:
        return Column(head, [cell(block) for block in shown], right)

    found = [
        column("#", lambda block: str(block.index), right=True),
        column("stage", lambda block: str(block.stage), right=True),
        column("name", lambda block: block.name),
        column("part", lambda block: part_name(block.part)),
        column("shortcut", lambda block: block.shortcut),
        column("modules", lambda block: " ".join(inside(block)) or "(none)"),
        column("parameters", lambda block: f"{block.parameters:,}", right=True),
    ]
    if len({block.stage for block in blocks}) == 1:
        del found[1]
    if total := blocks.flops:
        found.append(column("FLOPs", lambda block: f"{100 * block.flops / total:.1f} %", right=True))
        notes.append(f"FLOPs: share of the whole model's {total:,} on the example.")
    if any(limits(block) for block in shown):
        found.append(column("cannot be", lambda block: ", ".join(what for what, _ in limits(block))))
    return found


def _abilities(blocks: Blocks) -> list[str]:
    """What can be done with these blocks, and with which of them not, and why."""
    if not blocks:
        return []
    found: dict[tuple[str, str], list[str]] = {}
    for block in blocks:
        for limit in limits(block):
            found.setdefault(limit, []).append(block.name)
    able = [word for word in ("closed", "scaled", "removed") if not any(what == word for what, _ in found)]
    notes = []
    if able:
        who = "Every block" if len(blocks) > 1 else "It"
        notes.append(f"{who} can be {' and '.join(filter(None, [', '.join(able[:-1]), able[-1]]))}.")
    for (what, why), names in found.items():
        who = f"{len(names)} of {len(blocks)} cannot be {what}" if len(blocks) > 1 else f"It cannot be {what}"
        notes.append(f"{who} ({places(names)}): {why}." if why else f"{who}: {places(names)}.")
    if unseen := sum(block.verified == "structure" for block in blocks):
        who = "Verified" if unseen == len(blocks) else f"{unseen} of {len(blocks)} verified"
        notes.append(f"{who} by structure alone, on the meta device: which operations run, not what comes out.")
    return notes


def _grid(columns: list[Column], width: int, notes: list[str]) -> list[str]:
    """Lay the columns out in ``width`` characters: shorten, then leave out, until they fit."""

    def excess() -> int:
        return sum(column.width for column in columns) + 2 * (len(columns) - 1) - width if width else 0

    def shrink(head: str, least: int) -> None:
        for column in columns:
            if column.head == head and excess() > 0:
                room, shorten = max(least, column.width - excess()), cut_words if head == "modules" else cut
                column.cells = [shorten(cell, room) for cell in column.cells]

    names = next(column for column in columns if column.head == "name")
    shrink("modules", 16)
    if excess() > 0:
        _without_prefix(names, notes)
    shrink("name", 30)
    for head in ("modules", "stage", "shortcut", "part", "FLOPs", "parameters"):
        if excess() > 0:
            columns = [column for column in columns if column.head != head]
    shrink("name", 8)
    return [
        "  ".join(text.rjust(size) if right else text.ljust(size) for text, size, right in row).rstrip()
        for row in zip(*([(text, c.width, c.right) for text in (c.head, *c.cells)] for c in columns), strict=True)
    ]


def _without_prefix(names: Column, notes: list[str]) -> None:
    """Put ``…`` for the modules that all names begin with, the last of them excepted."""
    paths = [name.partition("/")[0].split(".") for name in names.cells]
    common = 0
    while all(len(path) > common + 1 and path[: common + 1] == paths[0][: common + 1] for path in paths):
        common += 1
    if common > 1:
        prefix = ".".join(paths[0][: common - 1]) + "."
        names.cells = ["…" + name.removeprefix(prefix) for name in names.cells]
        notes.append(f"… at the beginning of a name stands for {prefix!r}.")


def _wrap(text: str, width: int) -> Iterable[str]:
    """Break a note into lines of ``width``, what follows the first indented."""
    if not width or len(text) <= width:
        return [text]
    deeper = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(text, max(20, width), subsequent_indent=deeper, break_long_words=False, break_on_hyphens=False)
