"""ε-ResNet: a branch whose every response is at most ε contributes nothing, and withers.

Yu, Yu, Ramalingam, "Learning Strict Identity Mappings in Deep Residual Networks", CVPR 2018, section 3.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resect.blocks.example import Example, device_of
from resect.blocks.gate import Gates, Which, check_number
from resect.blocks.modes import kept_modes
from resect.blocks.plan import Plan
from resect.blocks.response import largest_response, watch
from resect.errors import AttachError, InputError, unknown
from resect.train.method import Method, is_recomputing


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
    return torch.where(is_muted(branch, epsilon), torch.zeros((), dtype=branch.dtype, device=branch.device), branch)


def is_muted(branch: Tensor, epsilon: float) -> Tensor:
    """Return whether ``max|branch| <= epsilon``, as a boolean tensor () on the branch's device."""
    return largest_response(branch) <= epsilon


class EpsilonGate(Method):
    """Mute each branch while its largest response over the batch is at most ``epsilon``; see ``epsilon_gate``.

    The gate acts in training and in eval mode, as in the authors' code, so its decision depends on the
    batch. ``finalize()`` turns the blocks that stayed muted into a ``Plan``.

    Parameters
    ----------
    model, blocks: the model and its blocks (``find_blocks``), all with a usable branch end.
    epsilon: threshold on max|f|; at least 0, where 0 changes nothing. The paper uses 2.5 on CIFAR
        (pre-activation ResNets, SGD with weight decay 2e-4), 1.8–2.1 on ImageNet.
    skip_muted_after: close a block for good once it was muted in this many steps running: its branch is
        not computed any more, so that training gets faster as the net gets shallower, and a block that
        hovers around ε is settled. None (the paper): every block can reopen at any time.
    settle_after: from this training step on nothing changes any more: blocks closed by
        ``skip_muted_after`` stay closed, all others are open without a gate, and what is trained to the end
        is the net that remains after cutting. None (the paper): gated to the end.
    optimizer: if given, a forgotten ``begin_step()`` is noticed.
    muted_at_start: ``"raise"`` refuses a model some of whose branches are muted before training starts
        (zero-initialised ones would stay muted for ever); ``"allow"`` is for a trained model.

    Raises
    ------
    AttachError: at ``attach()``, with the remedy, when branches start muted beyond chance (``max|f|`` at
        most half of ``epsilon`` on the example of the blocks, in train mode; between half and the whole,
        a warning), or when another method holds a block.
    InputError: ``epsilon`` is negative, or a block has no usable branch end.

    >>> method = resect.EpsilonGate(model, blocks, epsilon=2.5, optimizer=optimizer)
    >>> with method:
    ...     for x, y in loader:
    ...         method.begin_step()
    ...         loss_fn(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
    >>> plan = method.finalize(steps=200)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Which,
        *,
        epsilon: float = 2.5,
        skip_muted_after: int | None = None,
        settle_after: int | None = None,
        optimizer: Optimizer | None = None,
        muted_at_start: Literal["raise", "allow"] = "raise",
    ) -> None:
        check_number("epsilon", epsilon, 0)
        for name, value in (("skip_muted_after", skip_muted_after), ("settle_after", settle_after)):
            if value is not None:
                check_number(name, value, 1)
        if settle_after is not None and skip_muted_after is None:
            raise InputError("settle_after needs skip_muted_after: it says which blocks stay closed.")
        if muted_at_start not in ("raise", "allow"):
            raise unknown("muted_at_start", muted_at_start, ("raise", "allow"))
        super().__init__(model, blocks, optimizer)
        unusable = [block for block in self.blocks if not block.scalable]
        if unusable:
            raise InputError(
                f"{self.name} cannot act on {unusable[0].name!r} ({unusable[0].reason}). Leave out such blocks: "
                "blocks.select(b for b in blocks if b.scalable)."
            )
        self.epsilon = float(epsilon)
        self.skip_muted_after = skip_muted_after
        self.settle_after = settle_after
        self.muted_at_start = muted_at_start
        count, device = len(self.blocks), device_of(model)
        # One row per block, on the model's device, so that a step never waits for a copy to the host.
        self._counted_steps = 0
        self._muted_now = torch.zeros(count, dtype=torch.bool, device=device)
        self._seen = torch.zeros(count, dtype=torch.bool, device=device)
        self._run = torch.zeros(count, dtype=torch.long, device=device)
        self._largest = torch.zeros(count, device=device)

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        if self.epsilon and self.muted_at_start == "raise" and not self.steps and self.blocks.example:
            self._check_start(gates, self.blocks.example)
        for place, gate in enumerate(gates):
            gate.apply(_Act(self, place))
        self._skip(gates)

    def _skip(self, gates: Gates) -> None:
        """Close the blocks that were muted for long enough; once settled, take the gate off the others."""
        if self.skip_muted_after is None:
            return
        settled = self.settle_after is not None and self.steps >= self.settle_after
        for gate, run in zip(gates, self._run.tolist(), strict=True):
            if run >= self.skip_muted_after:
                if not gate.is_closed:
                    gate.close()
            elif settled and gate.state != "open":
                gate.open()

    def _check_start(self, gates: Gates, example: Example) -> None:
        """Raise if a branch is so far below ε that no batch will open it; warn if one is just below."""
        responses = measure_responses(self.model, gates, example)
        muted = {name: value for name, value in responses.items() if value <= self.epsilon}
        lost = {name: value for name, value in muted.items() if value <= self.epsilon / 2}
        if lost:
            name, value = min(lost.items(), key=lambda item: item[1])
            cause = (
                "It is zero-initialised: build the model without that (timm: zero_init_last=False), or train it "
                "without the gate first."
                if value < 1e-5
                else f"Use epsilon below {value:.3g}, or find the blocks with a real training batch as the example."
            )
            raise AttachError(
                f"{len(lost)} of {len(responses)} branches would start muted at epsilon = {self.epsilon:g} and, "
                f"without gradient, never learn: {name!r} has max|f| = {value:.3g}. {cause} "
                "For a net that is trained already, pass muted_at_start='allow'."
            )
        if muted:
            warnings.warn(
                f"{len(muted)} of {len(responses)} branches start just below epsilon = {self.epsilon:g} on the example "
                f"(max|f| from {min(muted.values()):.3g}); whether a batch opens them is a matter of chance.",
                stacklevel=5,
            )

    def _on_step(self) -> None:
        self._run, self._counted_steps = self._run_now(), self.steps
        self._seen.zero_()
        if self._gates is not None:
            self._skip(self._gates)

    def _run_now(self) -> Tensor:
        """Return the steps running in which each block was muted, the step under way included.

        A block was muted in a step if it was in all of its micro-batches; a closed one saw none and counts.
        """
        run = torch.where(self._seen, torch.where(self._muted_now, self._run + 1, 0), self._run)
        if self.skip_muted_after is not None and self._counted_steps < self.steps:
            run = torch.where(~self._seen & (self._run >= self.skip_muted_after), self._run + 1, run)
        return run

    def note(self, place: int, muted: Tensor, largest: Tensor) -> None:
        """Take down what the gate of one block decided on one training batch."""
        self._muted_now[place] = muted & (self._muted_now[place] | ~self._seen[place])
        self._largest[place] = torch.where(self._seen[place], torch.maximum(self._largest[place], largest), largest)
        self._seen[place] = True

    def muted_steps(self) -> dict[str, int]:
        """Return per block for how many training steps, up to the last one, it has been muted without a break."""
        return dict(zip(self.blocks.names, self._run_now().tolist(), strict=True))

    def responses(self) -> dict[str, float]:
        """Return per block the largest |f| in the latest training step."""
        return dict(zip(self.blocks.names, self._largest.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """Return ``muted``: how many blocks were muted in the latest step."""
        return {"muted": float(sum(run > 0 for run in self.muted_steps().values()))}

    def finalize(self, steps: int) -> Plan:
        """Return the plan to remove every block that was muted in each of the last ``steps`` training steps.

        The published rule (compressModel.py): a block goes only if it was never open in that time.
        """
        check_number("steps", steps, 1)
        if steps > self.steps:
            hint = (
                ""
                if self.steps
                else " Call method.begin_step() once per optimizer step: that is how steps are counted."
            )
            raise InputError(f"finalize(steps={steps}) asks for more steps than were trained ({self.steps}).{hint}")
        runs = self.muted_steps()
        gone = [block for block in self.blocks if runs[block.name] >= steps]
        evidence: dict[str, Any] = {
            "epsilon": self.epsilon,
            "steps_required": steps,
            "muted_steps": runs,
            "largest_response": self.responses(),
        }
        return Plan(tuple(gone), by="muted", evidence=evidence, model=type(self.model).__name__)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters of the muted blocks."""
        return super().state_dict() | {"run": self._run_now(), "largest": self._largest.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from ``state``; raises ``InputError`` if it is of another number of blocks."""
        if len(state["run"]) != len(self.blocks):
            raise InputError(f"This state is of {len(state['run'])} blocks, the method has {len(self.blocks)}.")
        super().load_state_dict(state)
        self._counted_steps = self.steps
        self._seen.zero_()
        self._run.copy_(state["run"])
        self._largest.copy_(state["largest"])
        if self._gates is not None:
            self._skip(self._gates)


def measure_responses(model: nn.Module, gates: Gates, example: Example) -> dict[str, float]:
    """Return max|f| of every branch on an example, in train mode, as the first training step will see it.

    Buffers, modes and random numbers are as before afterwards. An example too small for batch statistics
    is run in eval mode.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    largest = watch(gates)
    try:
        with kept_modes(model), torch.no_grad(), torch.random.fork_rng():
            try:
                example.run(model.train())
            except ValueError:  # batch norm: more than one value per channel, please
                example.run(model.eval())
    finally:
        for gate in gates:
            gate.open()
        for buffer, before in buffers:
            buffer.copy_(before)
    return largest


class _Act:
    """The gate function of one block: a class, so that a model with it can be copied and pickled."""

    def __init__(self, method: EpsilonGate, place: int) -> None:
        self.method: EpsilonGate | None = method
        self.place = place
        self.epsilon = method.epsilon

    def __call__(self, branch: Tensor) -> Tensor:
        if not self.epsilon:
            return branch
        largest = largest_response(branch)
        muted = largest <= self.epsilon
        if self.method is not None and self.method.model.training and not is_recomputing():
            self.method.note(self.place, muted, largest)
        return torch.where(muted, torch.zeros((), dtype=branch.dtype, device=branch.device), branch)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model keeps its gates, but reports to no method: that stays with the original.
        return {"method": None, "place": self.place, "epsilon": self.epsilon}
