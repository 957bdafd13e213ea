"""A recovery that was stopped: what was chosen, and how far training came, kept beside the place of the cut model."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from resect.blocks.plan import Plan
from resect.blocks.store import fingerprint
from resect.errors import check_all
from resect.lab import checkpoint
from resect.lab.open import Opened
from resect.lab.shrink.places import unfinished_folder
from resect.lab.shrink.wishes import Wishes
from resect.lab.text import TextData

_SECONDS = 60.0
"""Between two checkpoints, or 20 times what the last one took to write."""


class Unfinished:
    """The plans chosen so far, one of each round, and the state of the last recovery, in the newest checkpoint.

    Without a ``folder`` nothing is kept.
    """

    def __init__(self, folder: Path | None = None, asked: dict[str, Any] | None = None) -> None:
        self.folder, self.asked = folder, asked or {}
        self.plans: list[Plan] = []
        self.turn = 0
        """The round under way, from 0."""
        self._state: dict[str, Any] | None = None
        self._trained = -1
        """The round whose recovery the state is of."""
        self._count, self._due = 0, 0.0

    @classmethod
    def of(cls, cut: Path, opened: Opened, wishes: Wishes) -> Unfinished:
        """Read what is unfinished beside ``cut``, or begin anew where nothing is; without recovery nothing is kept.

        Raises:
            InputError: it was asked for otherwise, with every difference.
            FileError: it is damaged.
        """
        if not wishes.recover:
            return cls()
        kept = cls(unfinished_folder(cut), _asked(opened, wishes))
        last = checkpoint.newest(unfinished_folder(cut))
        if last is None:
            return kept
        content = checkpoint.load(last)
        differing = [
            f"{key} was {content['asked'].get(key)!r}, and is {now!r}"
            for key, now in kept.asked.items()
            if content["asked"].get(key) != now
        ]
        check_all(differing, f"{kept.folder} holds the recovery of another cut (delete it, or choose another --out)")
        kept.plans = [Plan.from_json(plan) for plan in content["plans"]]
        kept._state, kept._trained = content["state"], content["trained"]
        kept._count = int(last.name.removeprefix(checkpoint.PREFIX))
        return kept

    def plan(self, turn: int, choose: Callable[[], Plan]) -> Plan:
        """Begin a round; return its plan: the one chosen before the stop, or a new one, which is kept at once."""
        self.turn = turn
        if turn == len(self.plans):
            self.plans.append(choose())
            self._write()
        return self.plans[turn]

    @property
    def trained(self) -> bool:
        """Whether anything of a recovery was kept, not plans alone."""
        return self._trained >= 0

    @property
    def over(self) -> bool:
        """Whether the stop came in a later round: the weights of this one's recovery went into that one's."""
        return self._trained > self.turn

    @property
    def state(self) -> dict[str, Any] | None:
        """What was last kept of this round's recovery; None before the first time."""
        return self._state if self._trained == self.turn else None

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is so old that there should be another."""
        return self.folder is not None and time.monotonic() >= self._due

    def save(self, state: dict[str, Any]) -> None:
        """Keep the state of this round's recovery: dicts, lists and tuples of tensors and JSON data.

        Raises ``FileError`` where it cannot be written; the checkpoint before it is whole then.
        """
        self._state, self._trained = state, self.turn
        self._write()

    def _write(self) -> None:
        if self.folder is None:
            return
        begun = time.monotonic()
        self._count += 1
        plans = [plan.to_json() for plan in self.plans]
        content = {"asked": self.asked, "plans": plans, "state": self._state, "trained": self._trained}
        checkpoint.save(self.folder, self._count, content)
        now = time.monotonic()
        self._due = now + max(_SECONDS, 20 * (now - begun))

    def done(self) -> None:
        """Delete what was kept: the cut model is in its place."""
        if self.folder is None:
            return
        for last in checkpoint.checkpoints(self.folder):
            shutil.rmtree(last, ignore_errors=True)
        with suppress(OSError):  # someone else's files stay
            self.folder.rmdir()


def _asked(opened: Opened, wishes: Wishes) -> dict[str, Any]:
    """What must be the same when it goes on, as JSON."""
    told = {field.name: getattr(wishes, field.name) for field in fields(wishes)}
    told["plan"] = wishes.plan and wishes.plan.to_json()
    told |= {"model": opened.name, "weights": fingerprint(opened.model)[:16]}
    told["data"] = getattr(opened.data, "name", None)
    digest = hashlib.sha256()
    for tensor in [opened.data.sequences] if isinstance(opened.data, TextData) else opened.images("train"):
        for part in tensor.split(4096):
            digest.update(part.numpy().tobytes())
    told["samples"] = digest.hexdigest()[:16]
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found
