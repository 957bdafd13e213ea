"""The ε-gate itself, and the check that training can start with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from resect.blocks.ranks import gathered
from resect.blocks.recompute import is_recomputing
from resect.blocks.response import in_units_of_stream, largest_response, sizes
from resect.blocks.state import Gate
from resect.errors import AttachError

Note = Callable[[int, Tensor, Tensor], None]


def epsilon_gate(branch: Tensor, epsilon: float) -> Tensor:
    """Return ``branch``, or zeros if every ``|element| <= epsilon``.

    One decision for the whole tensor (the paper's per-device batch). Open, value and gradient are those
    without the gate. Muted, the value is 0 and the gradients are zeros, not None: weight decay and
    momentum go on acting, which makes the branch wither. ``epsilon = 0`` is no gate at all. A NaN counts
    as open, so that a diverged branch stays visible.

    Equal, in value and gradient, to the paper's ``f·(1 − relu(1 − K·relu(1 − K·s)))`` of four ReLUs with
    ``s = max(relu(f − ε) + relu(−f − ε))``, except on its ramp of width 1/K (about 1e-6).
    """
    if epsilon == 0:
        return branch
    return zero_where(largest_response(branch) <= epsilon, branch)


def zero_where(muted: Tensor, branch: Tensor) -> Tensor:
    """Return ``branch``, or zeros of its shape where ``muted``, a boolean tensor (); gradients likewise."""
    return torch.where(muted, torch.zeros((), dtype=branch.dtype, device=branch.device), branch)


class Muting:
    """The gate function of one block: a class, so that a model with it can be copied and pickled.

    A copy of the model keeps its gates, but reports to no method and asks no other process: that stays with the
    original. ``shared``: the block's owner, while whose training all processes decide together. ε is kept as a
    tensor too: compiled code reads that one, and is not bound to the number.
    """

    def __init__(self, note: Note | None, epsilon: float, place: int, shared: nn.Module | None = None) -> None:
        self.note, self.place, self.shared = note, place, shared
        self.set(epsilon)

    def set(self, epsilon: float) -> None:
        """Mute responses of at most ``epsilon`` from now on."""
        self.epsilon, self.threshold = epsilon, torch.tensor(epsilon, dtype=torch.float64)

    def put(self, gate: Gate, *, closed: bool, settled: bool, at_sum: bool) -> None:
        """Close a gate, open it for good, or let it mute, at the branch end or ``at_sum``; unless it is so already."""
        if closed:
            if not gate.is_closed:
                gate.close()
        elif settled:
            if gate.state != "open":
                gate.open()
        elif not gate.changes:
            _ = gate.join_by(self.join) if at_sum else gate.apply(self)

    def __call__(self, branch: Tensor) -> Tensor:
        """Return the branch end, or zeros, by the size of its largest response."""
        return branch if self._idle() else self._gate(branch, self._rows(largest_response(branch)).max())

    def join(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return shortcut plus branch, or the shortcut, by the largest response in units of the stream."""
        if self._idle():
            return shortcut + branch
        return shortcut + self._gate(branch, in_units_of_stream(self._rows(sizes(branch, shortcut))))

    def _idle(self) -> bool:
        return self.note is None and not is_compiling() and not self.epsilon

    def _rows(self, row: Tensor) -> Tensor:
        return gathered(row) if self.shared is not None and self.shared.training else row[None]

    def _gate(self, branch: Tensor, response: Tensor) -> Tensor:
        threshold = self.threshold.to(response.dtype)
        muted = (response <= threshold) & (threshold > 0)
        if self.note is not None and not is_recomputing():
            self.note(self.place, muted, response)
        if not is_compiling() and not self.epsilon:
            return branch  # what follows gives the same, and the same gradients, but takes its time
        return zero_where(muted, branch)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"note": None, "shared": None}


def check_start(responses: Mapping[str, float], epsilon: float) -> None:
    """Raise if a branch is so far below ε that no batch will open it; warn if one is just below.

    ``responses``: max|f| by block name, in the units of ``epsilon``.
    """
    muted = {name: value for name, value in responses.items() if value <= epsilon}
    lost = {name: value for name, value in muted.items() if value <= epsilon / 2}
    if lost:
        name, value = min(lost.items(), key=lambda item: item[1])
        cause = (
            "It is zero-initialised: start the gate late (epsilon=resect.schedules.StartAt(value, step)), build the "
            "model without that (timm: zero_init_last=False), or train it without the gate first."
            if value < 1e-5
            else f"Use epsilon below {value:.3g}, or find the blocks with a real training batch as the example."
        )
        raise AttachError(
            f"{len(lost)} of {len(responses)} branches would start muted at epsilon = {epsilon:g} and, "
            f"without gradient, never learn: {name!r} has max|f| = {value:.3g}. {cause} "
            "For a net that is trained already, pass muted_at_start='allow'."
        )
    if muted:
        warnings.warn(
            f"{len(muted)} of {len(responses)} branches start just below epsilon = {epsilon:g} on the example "
            f"(max|f| from {min(muted.values()):.3g}); whether a batch opens them is a matter of chance.",
            stacklevel=6,
        )
