"""Counting for how long branches have been muted, on the model's device: a step waits for no copy to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resect.blocks.ranks import gathered
from resect.errors import InputError

_FIELDS = ("run", "largest", "largest_in_run", "average")


class MutedCount:
    """Per block: steps muted without a break, largest responses; over all blocks: the running mean of the count.

    A block was muted in a step if it was in all of the step's micro-batches; one that is kept closed because
    it was muted sees none, and counts as muted.
    """

    def __init__(self, blocks: int, device: torch.device | None) -> None:
        self.run = torch.zeros(blocks, dtype=torch.long, device=device)
        """Steps running in which each block was muted, up to the last whole step."""
        self.largest = torch.zeros(blocks, device=device)
        """The largest response of the latest step in which the block was computed."""
        self.largest_in_run = torch.zeros(blocks, device=device)
        """The largest response in the steps that ``run`` counts."""
        self.average = torch.zeros((), device=device)
        """The running mean of the number of muted blocks (tensorpack's, decay min(0.95, (1 + t)/(10 + t)))."""
        self.steps = 0
        self._under_way = False
        self._muted = torch.zeros(blocks, dtype=torch.bool, device=device)
        self._seen = torch.zeros(blocks, dtype=torch.bool, device=device)

    def to(self, device: torch.device | None) -> None:
        """Move the counts: a trainer may have moved the model since."""
        for name in (*_FIELDS, "_muted", "_seen"):
            setattr(self, name, getattr(self, name).to(device))

    def note(self, place: int, muted: Tensor, response: Tensor) -> None:
        """Take down what the gate of one block decided on one training batch."""
        response = response.to(self.largest.dtype)
        self._muted[place] = muted & (self._muted[place] | ~self._seen[place])
        self.largest[place] = torch.where(self._seen[place], torch.maximum(self.largest[place], response), response)
        self._seen[place] = True

    def agree(self) -> None:
        """Let a block count as muted where it is on all processes; every process must call this."""
        rows = gathered(torch.stack([self._muted | ~self._seen, self._seen, self.largest]))
        self._muted, self._seen = rows[:, 0].all(0), rows[:, 1].any(0)
        self.largest = rows[:, 2].amax(0)

    def begin(self, closed: Tensor) -> None:
        """Begin a step, ending the one under way; ``closed``: bool (blocks,), those kept closed because muted."""
        self.run, self.largest_in_run, self.average = self.now(closed)
        self.steps += self._under_way
        self._under_way = True
        self._seen.zero_()

    def now(self, closed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``run``, ``largest_in_run`` and ``average`` with the step under way counted, if there is one."""
        if not self._under_way:
            return self.run, self.largest_in_run, self.average
        muted = torch.where(self._seen, self._muted, closed)
        known = self._seen | closed  # a block that saw nothing (a lesion, eval mode) stays as it is
        run = torch.where(known, torch.where(muted, self.run + 1, 0), self.run)
        response = torch.where(self._seen, self.largest, self.largest_in_run)
        in_run = torch.where(run > self.run, torch.maximum(self.largest_in_run, response), self.largest_in_run)
        in_run = torch.where(run > 0, in_run, 0.0)
        decay = min(0.95, (1 + self.steps) / (10 + self.steps))
        average = decay * self.average + (1 - decay) * torch.where(known, muted, run > 0).sum()
        return run, in_run, average

    def settle(self, closed: Tensor) -> None:
        """Count all blocks but the closed ones as open from now on: they run without a gate, and nothing notes them."""
        self.run = torch.where(closed, self.run, 0)

    def state_dict(self, closed: Tensor) -> dict[str, Any]:
        """Return the counts as tensors, the step under way counted."""
        run, in_run, average = self.now(closed)
        values = (run, self.largest, in_run, average)
        state = {name: value.clone() for name, value in zip(_FIELDS, values, strict=True)}
        return state | {"counted": self.steps + self._under_way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from ``state``; raises ``InputError`` if it is of another number of blocks."""
        if len(state["run"]) != len(self.run):
            raise InputError(f"This state is of {len(state['run'])} blocks, the method has {len(self.run)}.")
        for name in _FIELDS:
            getattr(self, name).copy_(state[name])
        self.steps, self._under_way = int(state["counted"]), False
        self._seen.zero_()
