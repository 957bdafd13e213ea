"""ε-ResNet: a branch whose every response is at most ε contributes nothing, and withers.

Yu, Yu, Ramalingam, "Learning Strict Identity Mappings in Deep Residual Networks", CVPR 2018, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resect.blocks.example import Forward, device_of, forward_batch
from resect.blocks.gate import Gates, Which, check_number
from resect.blocks.modes import kept_modes
from resect.blocks.plan import Plan
from resect.blocks.ranks import several_ranks
from resect.blocks.response import look_on_example
from resect.errors import InputError, check_all
from resect.train.freeze import Parts
from resect.train.method import Method
from resect.train.muted import MutedCount
from resect.train.muting import Muting, check_start
from resect.train.own_drop import OwnDrop, take_over
from resect.train.problems import check_ends, choice_problems, count_problems, number_problems
from resect.train.schedules import Schedule, as_schedule
from resect.train.side import SideSupervision

Units = Literal["absolute", "stream"]
Sync = Literal["ranks", "none"]


class EpsilonGate(Method):
    """Mute each branch while its largest response over the batch is at most ``epsilon``; see ``epsilon_gate``.

    The gate acts in training and in eval mode, as in the authors' code, so its decision depends on the
    batch. ``finalize()`` turns the blocks that stayed muted into a ``Plan``.

    Parameters
    ----------
    model, blocks: the model and its blocks (``find_blocks``), all with a usable branch end.
    epsilon: threshold on max|f|, a number of at least 0 or a schedule of the step; 0 changes nothing. The paper
        uses 2.5 on CIFAR (pre-activation ResNets, SGD with weight decay 2e-4), 1.5 on SVHN, 1.8–2.1 on ImageNet.
        ``resect.schedules.StartAt(2.5, step)`` starts late, which zero-initialised branches need.
    units: ``"absolute"`` (the paper), or ``"stream"``: beyond the paper, ``epsilon`` times the root mean
        square of the shortcut on this batch, so that one value fits nets whose streams differ in size.
    sync: of several processes: ``"ranks"``: one decision on the batch of all, by a small exchange per block and forward
        pass in train mode. ``"none"`` (the paper): each for itself; a block counts as muted where it is on all.
    side: weight of the side supervision in ``extra_loss(y)``; the paper's is 0.1, 0 (default) is none. Its head's
        weights are in ``parameters()`` and must be given to an optimizer.
    side_at: the block after whose owner the head sits; None: the published place, the middle block.
    skip_muted_after: close a block once it was muted in this many steps running: its branch is not computed any
        more, so that training gets faster as the net gets shallower. None (the paper): always computed.
    recheck_every: every so many steps the closed blocks are computed again for one step; one that the gate then
        leaves open counts anew. 0: a closed block stays closed.
    settle_after: from this training step on nothing changes any more: blocks closed by
        ``skip_muted_after`` stay closed, all others are open without a gate, and what is trained to the end
        is the net that remains after cutting. None (the paper): gated to the end.
    seed: of the side head's first weights.
    optimizer: whose steps ``begin_step()`` is checked against, and that must hold the side head; by default
        every optimizer's that holds weights of the model.
    muted_at_start: ``"raise"`` refuses a model some of whose branches are muted before training starts
        (zero-initialised ones would stay muted for ever); ``"allow"`` is for a trained model.
    own_drop: as for ``StochasticDepth``: a branch that the model drops itself would count as muted.

    Raises
    ------
    AttachError: at ``attach()``, with the remedy, when branches start muted beyond chance (``max|f|`` at
        most half of ``epsilon`` on the example of the blocks, in train mode; between half and the whole,
        a warning), when another method holds a block, or when ``optimizer`` lacks the side head.
    InputError: every wrong value at once, or a block has no usable branch end.

    >>> method = resect.EpsilonGate(model, blocks, epsilon=2.5, side=0.1)
    >>> optimizer = torch.optim.SGD([*model.parameters(), *method.parameters()], lr=0.1, weight_decay=2e-4)
    >>> with method:
    ...     for x, y in loader:
    ...         method.begin_step()
    ...         loss = loss_fn(model(x), y) + method.extra_loss(y)
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    >>> plan = method.finalize(steps=238, data=test_loader)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Which,
        *,
        epsilon: float | Schedule = 2.5,
        units: Units = "absolute",
        sync: Sync = "ranks",
        side: float = 0.0,
        side_at: str | None = None,
        skip_muted_after: int | None = None,
        recheck_every: int = 0,
        settle_after: int | None = None,
        seed: int = 0,
        optimizer: Optimizer | None = None,
        muted_at_start: Literal["raise", "allow"] = "raise",
        own_drop: OwnDrop = "refuse",
    ) -> None:
        super().__init__(model, blocks, optimizer)
        problems = [
            *number_problems("epsilon", epsilon, 0, float("inf")),
            *number_problems("side", side, 0, float("inf")),
            *choice_problems(units=(units, Units), muted_at_start=(muted_at_start, Literal["raise", "allow"])),
            *choice_problems(own_drop=(own_drop, OwnDrop), sync=(sync, Sync)),
            *count_problems(recheck_every=(recheck_every, 0), seed=(seed, 0)),
        ]
        for name, value in (("skip_muted_after", skip_muted_after), ("settle_after", settle_after)):
            problems += [] if value is None else count_problems(**{name: (value, 1)})
        if skip_muted_after is None and (settle_after is not None or recheck_every):
            problems.append("settle_after and recheck_every need skip_muted_after: it says which blocks are closed")
        if side_at is not None and not side:
            problems.append("side_at names the place of side supervision: it needs a weight, side=0.1")
        check_all(problems, self.name)
        check_ends(self.blocks, self.name)
        self.schedule, self.units, self.sync = as_schedule(epsilon), units, sync
        self.skip_muted_after, self.recheck_every, self.settle_after = skip_muted_after, recheck_every, settle_after
        self.muted_at_start, self.own_drop = muted_at_start, own_drop
        self.side, self.side_at, self.seed = float(side), side_at, seed
        self._side = SideSupervision(self.model, self.blocks, side_at, seed) if side else None
        self.count = MutedCount(len(self.blocks), device_of(self.model))
        self._rechecking, self._moves = False, skip_muted_after is not None
        self._tested: Tensor | None = None  # largest responses on test data, while finalize() looks

    @property
    def epsilon(self) -> float:
        """ε in the current step."""
        return self.schedule(max(0, self.steps - 1))

    @property
    def muted_average(self) -> float:
        """The running mean of the number of muted blocks, up to the latest step; what ``AdaptiveLR`` watches."""
        return float(self.count.now(self._closed())[2])

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        take_over(self.model, self.own_drop, self.name, undo)
        self.count.to(device_of(self.model))
        start = self.schedule(0)
        if start and self.muted_at_start == "raise" and not self.steps and self.blocks.example:
            found = look_on_example(self.model, self.blocks, self.blocks.example, relative=self.units == "stream")
            check_start(found, start)
        if self._side is not None:
            self._side.attach(undo)
        self._parts = Parts(self.model, self.blocks) if self.skip_muted_after is not None else None
        shared = self.sync == "ranks" and several_ranks()
        self._acts = [
            Muting(self.note, self.epsilon, place, gate.owner if shared else None) for place, gate in enumerate(gates)
        ]
        self._put(gates)
        self._skip(gates)

    def _put(self, gates: Gates, closed: list[bool] | None = None, settled: bool = False) -> None:
        """Close some blocks; the others get their gate, or none once settled."""
        for gate, act, is_closed in zip(gates, self._acts, closed or [False] * len(gates), strict=True):
            act.put(gate, closed=is_closed, settled=settled, at_sum=self.units == "stream")

    def _closed(self) -> Tensor:
        """Return which blocks are kept closed because they were muted, bool (blocks,)."""
        if self.skip_muted_after is None:
            return torch.zeros_like(self.count.run, dtype=torch.bool)
        return self.count.run >= self.skip_muted_after

    def _skip(self, gates: Gates) -> None:
        """Close the blocks that were muted for long enough; once settled, take the gate off the others."""
        if self.skip_muted_after is None:
            return
        settled = self.settle_after is not None and self.steps >= self.settle_after
        if settled:
            self.count.settle(self._closed())
        recheck = self._rechecking and not settled
        self._put(gates, [closed and not recheck for closed in self._closed().tolist()], settled)

    def _on_step(self) -> None:
        self._check_optimised()
        self._agree()  # of a step that no optimizer took
        self.count.begin(self._closed())
        if self._parts is not None:
            self._parts.check(self.model, self.name)
        epsilon = self.schedule(self.steps)
        check_number("epsilon", epsilon, 0)
        for act in self._acts:
            act.set(epsilon)
        assert self._gates is not None
        self._rechecking = bool(self.recheck_every and self.steps and self.steps % self.recheck_every == 0)
        self._skip(self._gates)

    def _agree(self) -> None:
        if self.sync == "none" and several_ranks():  # yet a block is closed on all processes or on none
            self.count.agree()

    def _states(self, picked: list[bool]) -> Iterator[None]:
        assert self._gates is not None
        for settled in [False, True][: 1 + (self.settle_after is not None)]:
            self._put(self._gates, [pick and self.skip_muted_after is not None for pick in picked], settled)
            yield

    def _before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._agree()
        if self._side is not None:
            self._side.check()
        if self._parts is not None and self._gates is not None:
            self._parts.leave_out_closed(self._gates)

    def extra_loss(self, target: Any = None) -> Tensor | float:
        """Return the side supervision's loss times its weight; ``target``: the labels (N,) of the batch."""
        return self.side * self._side.loss(target) if self._side is not None else 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of the side head."""
        return self._side.head.parameters() if self._side is not None else iter(())

    def muted_steps(self) -> dict[str, int]:
        """Return per block for how many training steps, up to the last one, it has been muted without a break."""
        return dict(zip(self.blocks.names, self.count.now(self._closed())[0].tolist(), strict=True))

    def responses(self) -> dict[str, float]:
        """Return per block the largest |f| (in ``units``) in the latest training step that computed it."""
        return dict(zip(self.blocks.names, self.count.largest.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """Return how many blocks were ``muted`` in the latest step, and their running mean, ``muted_average``."""
        muted = float(sum(run > 0 for run in self.muted_steps().values()))
        return {"muted": muted, "muted_average": self.muted_average}

    def finalize(self, steps: int, data: Iterable[Any] | None = None, forward: Forward | None = None) -> Plan:
        """Return the plan to remove every block that was muted in each of the last ``steps`` training steps.

        The published rule (compressModel.py): a block goes only if it was never open in that time; the
        authors' log shows at least 238 steps. The plan's evidence has, per block, the steps muted, the largest
        response in the latest step and over the muted steps, and with ``data`` (batches, as for
        ``lesion_study``) the largest response on that, in eval mode, nothing closed.
        """
        check_number("steps", steps, 1)
        if steps > self.steps:
            hint = "" if self.steps else " Call method.begin_step() once per optimizer step: that counts them."
            raise InputError(f"finalize(steps={steps}) asks for more steps than were trained ({self.steps}).{hint}")
        runs, in_run, _ = self.count.now(self._closed())
        gone = [block for block, run in zip(self.blocks, runs.tolist(), strict=True) if run >= steps]
        evidence: dict[str, Any] = {
            "epsilon": self.epsilon,
            "units": self.units,
            "steps_required": steps,
            "muted_steps": self.muted_steps(),
            "largest_response": self.responses(),
            "largest_while_muted": dict(zip(self.blocks.names, in_run.tolist(), strict=True)),
        }
        if data is not None:
            evidence["largest_in_data"] = self._test(data, forward)
        model, among = type(self.model).__name__, self.blocks.whole
        return Plan(tuple(gone), by="muted", evidence=evidence, model=model, among=among)

    def _test(self, data: Iterable[Any], forward: Forward | None) -> dict[str, float]:
        """Return the largest response of every block on data, in eval mode and gated, none closed."""
        with ExitStack() as undo:
            if not self.attached:
                self._attach()  # on this process alone: no other one need test
                undo.callback(self.detach)
            assert self._gates is not None
            undo.enter_context(kept_modes(self.model))
            undo.callback(self._skip, self._gates)
            self._tested = torch.zeros_like(self.count.largest)
            undo.callback(setattr, self, "_tested", None)
            for act in self._acts:
                act.set(self.epsilon)
            self._put(self._gates)
            self.model.eval()
            run = forward or forward_batch
            with torch.no_grad():
                batches = [run(self.model, batch) is None for batch in data]
            if not batches:
                raise InputError("finalize(data=…) needs at least one batch, and there is none.")
            return dict(zip(self.blocks.names, self._tested.tolist(), strict=True))

    def note(self, place: int, muted: Tensor, response: Tensor) -> None:
        """Take down what the gate of one block decided on one batch."""
        if self.model.training:
            self.count.note(place, muted, response)
        elif self._tested is not None:
            self._tested[place] = torch.maximum(self._tested[place], response.to(self._tested.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Return the counters of the muted blocks, and the side head."""
        state = super().state_dict() | self.count.state_dict(self._closed())
        return state | ({"side": self._side.head.state_dict()} if self._side is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from ``state``; raises ``InputError`` if it is of another number of blocks."""
        self._check_state(state)
        self.count.load_state_dict(state)
        super().load_state_dict(state)
        if self._side is not None:
            self._side.head.load_state_dict(state["side"])
        if self._gates is not None:
            for act in self._acts:
                act.set(self.epsilon)
            self._skip(self._gates)
