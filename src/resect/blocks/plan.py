"""The blocks to go and why: JSON in and out.

It lives beside the blocks because training (`EpsilonGate.finalize`), analysis and shrinking all make or
read plans, and never import each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resect.blocks.block import Blocks, ResidualBlock
from resect.errors import FileError, InputError, ResectError, check_all
from resect.files import write_text

FORMAT = "resect-plan"
VERSION = 1
SHARDED = "FSDP"
"""What ``fully_shard`` puts before the name of a class."""
SHOWN = 8
"""Differences that an error lists."""


@dataclass(frozen=True)
class Plan:
    """Which residual blocks are to be removed, chosen how, and on what evidence."""

    blocks: tuple[ResidualBlock, ...]
    by: str = "names"
    """How they were chosen: ``names``, ``lesion``, ``muted`` …"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """A number per block (of all blocks, not only those that go), where the choice was by score."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What speaks for the choice: JSON values."""
    model: str = ""
    """Class name of the model it was made for."""
    among: tuple[str, ...] = ()
    """Names of all blocks of that model; () where it is not known."""

    @property
    def names(self) -> list[str]:
        """Return the canonical names of the blocks to go."""
        return [block.name for block in self.blocks]

    @classmethod
    def of(cls, blocks: Blocks, which: Plan | Blocks | str | Iterable[str]) -> Plan:
        """Read a plan, or names of blocks, against the blocks of a model.

        Raises ``InputError`` for unknown names, and for a plan that was made for another model, with all differences.
        The same architecture with other weights is no other model.
        """
        if not isinstance(which, Plan):
            return cls(tuple(blocks.select(which)), model=blocks.model, among=blocks.whole)
        check_all(
            which.differences(blocks),
            f"This plan was made for another model than this {blocks.model or 'one'} (blocks of these names can go all "
            "the same: give the names)",
            limit=SHOWN,
        )
        return which

    def differences(self, blocks: Blocks) -> list[str]:
        """Say how the model of ``blocks`` differs from the one that the plan was made for; nothing where it is one."""
        here = {block.name: block for block in blocks}
        told = []
        if self.model and blocks.model and self.model.removeprefix(SHARDED) != blocks.model.removeprefix(SHARDED):
            told.append(f"its class is {blocks.model}, and the plan has {self.model}")
        absent = {True: "not among the blocks given:", False: "it has no block"}
        told += [f"{absent[name in blocks.whole]} {name}" for name in self.names if name not in here]
        if self.among and blocks.model:  # blocks that nobody found know nothing of the others
            told += [f"it has no block {n}" for n in self.among if n not in blocks.whole and n not in self.names]
            told += [f"it has a block {n}, unknown to the plan" for n in blocks.whole if n not in self.among]
        for block in self.blocks:
            now = here.get(block.name, block)
            told += [
                f"{block.name} has {value(now)} here, and {value(block)} in the plan"
                for value in (_shortcut, _weights)
                if value(now) != value(block)
            ]
        return told

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "among": list(self.among),
            "by": self.by,
            "blocks": [block.to_json() for block in self.blocks],
            "scores": dict(self.scores),
            "evidence": dict(self.evidence),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Rebuild from ``to_json``; raises ``InputError`` if it is something else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InputError('This is not a plan written by Resect (no "format": "resect-plan").')
        if data.get("version") != VERSION:
            raise InputError(f"This plan has version {data.get('version')!r}; this Resect reads version {VERSION}.")
        wrong = [key for key in ("scores", "evidence") if not isinstance(data.get(key), Mapping)]
        wrong += ["blocks"] * (not _mappings(data.get("blocks")))
        if wrong:
            raise InputError(f"This plan is damaged: look at its {', '.join(wrong)}.")
        try:
            return cls(
                tuple(ResidualBlock.from_json(block) for block in data["blocks"]),
                by=data["by"],
                scores=data["scores"],
                evidence=data["evidence"],
                model=data["model"],
                among=tuple(data.get("among", ())),  # older plans have none
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"This plan is damaged: {error!r}.") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; raises ``FileError`` if the file is missing, damaged or not a plan."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, ResectError) as error:
            raise FileError(f"Cannot read the plan {str(path)!r}: {error}") from error

    def __str__(self) -> str:
        noun = "residual block" if len(self.blocks) == 1 else "residual blocks"
        lines = [f"{len(self.blocks)} {noun} to go, chosen by {self.by}" + ":" * bool(self.blocks)]
        for block in self.blocks:
            score = f"  {self.scores[block.name]:+.4g}" if block.name in self.scores else ""
            lines.append(f"  {block.name}  ({block.shortcut}, {block.parameters:,} parameters){score}")
        return "\n".join(lines)


def _shortcut(block: ResidualBlock) -> str:
    return f"the shortcut {block.shortcut!r}"


def _weights(block: ResidualBlock) -> str:
    return f"{block.parameters:,} parameters"


def _mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
