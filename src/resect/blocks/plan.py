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
from resect.errors import FileError, InputError, ResectError
from resect.files import write_text

FORMAT = "resect-plan"
VERSION = 1


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

    @property
    def names(self) -> list[str]:
        """Return the canonical names of the blocks to go."""
        return [block.name for block in self.blocks]

    @classmethod
    def of(cls, blocks: Blocks, which: Plan | Blocks | str | Iterable[str]) -> Plan:
        """Read a plan, or names of blocks, against the blocks of a model."""
        if isinstance(which, Plan):
            unknown = sorted(set(which.names) - set(blocks.names))
            if unknown:
                raise InputError(
                    f"This plan, made for a {which.model or 'model'}, names blocks that this {blocks.model or 'model'} "
                    f"does not have: {', '.join(unknown)}. Its blocks are: {', '.join(blocks.names)}."
                )
            return which
        chosen = blocks.select(which)
        return cls(tuple(chosen), model=blocks.model)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
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


def _mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
