"""ResidualDroppath: drop branches in one iteration, train the dropped ones in the next.

An interpretation of the abstract of Park, "ResidualDroppath: Enhancing Feature Reuse over Residual Connections",
arXiv 2411.09475 (2024). The full text was not available to us.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resect.blocks.gate import Gates, Which
from resect.blocks.hooks import Hook
from resect.errors import AttachError
from resect.train.consistency import Consistency
from resect.train.draws import draw_closed
from resect.train.dropping import OwnDrop, Scaling, Scheduled
from resect.train.freeze import Norms, Stillness, check_modes
from resect.train.masks import Compute, Per
from resect.train.method import Batch
from resect.train.phases import Alternation, Kind
from resect.train.problems import check_ends, choice_problems, count_problems, number_problems, per_problems
from resect.train.rates import Rates
from resect.train.sample_freeze import SampleFreeze
from resect.train.schedules import Rule, Schedule, as_schedule, rule_problems

Forward = Literal["full", "dropped"]
Mask = Literal["same", "fresh"]
Data = Literal["next", "same"]
Update = Literal["dropped", "all"]
Rest = Literal["frozen", "trained"]
Backward = Literal["through", "shortcuts"]


class ResidualDroppath(Scheduled):
    """An interpretation of the paper's abstract: *drop* iterations and *dropped-only* iterations take turns.

    1. *drop*: draw M, every block l dropped with probability p_l. Train the rest of the net on a batch:
       ``x + (1 − M_l)·f_l(x)``. Dropped blocks are not computed and stand still.
    2. *dropped-only*: run the full net, ``x + f_l(x)``, on the next batch; gradients flow through all of it, but only
       the blocks of M learn. All else stands still bit for bit: weights, buffers, momentum.

    An empty M makes both plain steps (``metrics()["plain_steps"]`` counts them). Evaluation: the full net. Two such
    steps cost 5 − 2p forward-sized passes against 6 of two plain ones, p the mean probability.

    The abstract leaves much open. Each reading is an option, the default named first:

    Parameters
    ----------
    model, blocks: the model and the blocks that may drop; leave blocks that change the shape out with
        ``blocks.kind("identity")``.
    drop_prob, rule: 0.5, linear over depth, as for ``StochasticDepth``; the paper's value is unknown.
    per: ``"batch"``: one draw per block. ``"sample"``: one per block and sample; a block then learns, in the
        dropped-only step, from the samples that dropped it, and no running statistics move in that step.
    forward: of the dropped-only step: ``"full"`` net, or the ``"dropped"`` blocks alone.
    mask: of the dropped-only step: the ``"same"`` as in the drop step, or a ``"fresh"`` draw.
    data: of the dropped-only step: the ``"next"`` batch, or the ``"same"`` one: then loop ``for batch in
        method.batches(loader)``, which yields each batch once per step (an epoch has twice the steps).
    drop_steps: 1; drop steps per dropped-only step.
    period: 1; dropped-only steps in a row. An epoch's number of steps alternates by epochs.
    warmup: 0; plain steps before.
    update: in the dropped-only step the ``"dropped"`` blocks learn, or ``"all"`` (a control).
    rest: what belongs to no branch (stem, shortcuts, classifier) is ``"frozen"`` in the dropped-only step, or
        ``"trained"``.
    backward: gradients flow ``"through"`` frozen branches, or past them along ``"shortcuts"`` alone.
    norms: of frozen parts in the dropped-only step: ``"batch"`` statistics with the running ones standing still,
        ``"moving"`` running statistics (what a bare ``requires_grad=False`` does), or ``"eval"`` mode. The drop
        step moves the statistics of what it runs; ``resect.recalibrate`` renews them all at the end.
    scaling: ``"none"``, ``"inverted"`` (of the drop step), ``"paper"``; see ``Dropping``.
    consistency: 0; weight of KL(drop step's output ‖ this one's) in ``extra_loss()`` of the dropped-only step;
        needs ``data="same"`` and a model that returns logits (N, classes).
    stillness: what a parameter that must not learn gives the optimizer: ``"skip"``: None, nothing moves;
        ``"zero"``: zeros, momentum and weight decay go on (as in Huang's code).
    lr_scale: 1; factor on the learning rate in dropped-only steps. There is one optimizer state.
    compute (of the drop step), seed, optimizer, own_drop: as for ``StochasticDepth``.

    Raises
    ------
    InputError: every wrong option at once.
    AttachError: as ``StochasticDepth``; from ``begin_step()`` with ``data="same"`` outside ``method.batches(loader)``.

    >>> method = resect.ResidualDroppath(model, blocks, drop_prob=0.5, optimizer=optimizer)
    >>> with method:
    ...     for x, y in method.batches(loader):
    ...         method.begin_step()
    ...         loss = loss_fn(model(x), y) + method.extra_loss()
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Which,
        *,
        drop_prob: float | Schedule = 0.5,
        rule: Rule = "linear",
        per: Per = "batch",
        compute: Compute = "auto",
        forward: Forward = "full",
        mask: Mask = "same",
        data: Data = "next",
        drop_steps: int = 1,
        period: int = 1,
        warmup: int = 0,
        update: Update = "dropped",
        rest: Rest = "frozen",
        backward: Backward = "through",
        norms: Norms = "batch",
        scaling: Scaling = "none",
        consistency: float = 0.0,
        stillness: Stillness = "skip",
        lr_scale: float = 1.0,
        seed: int = 0,
        optimizer: Optimizer | None = None,
        own_drop: OwnDrop = "refuse",
    ) -> None:
        super().__init__(model, blocks, scaling=scaling, seed=seed, optimizer=optimizer, own_drop=own_drop)
        problems = [
            *number_problems("drop_prob", drop_prob),
            *rule_problems(rule, len(self.blocks)),
            *choice_problems(
                forward=(forward, Forward),
                mask=(mask, Mask),
                data=(data, Data),
                update=(update, Update),
                rest=(rest, Rest),
                backward=(backward, Backward),
                norms=(norms, Norms),
                stillness=(stillness, Stillness),
            ),
            *per_problems(per, compute),
            *count_problems(drop_steps=(drop_steps, 1), period=(period, 1), warmup=(warmup, 0)),
            *number_problems("consistency", consistency, 0, float("inf")),
            *number_problems("lr_scale", lr_scale, 0, float("inf")),
        ]
        if data == "same" and period != 1:
            problems.append('data="same" trains both kinds of step on one batch: period must be 1')
        if consistency and (data != "same" or per != "batch"):
            problems.append('consistency compares two outputs for one batch: it needs data="same" and per="batch"')
        self._check(problems)
        if per == "sample" or backward == "shortcuts":
            check_ends(self.blocks, f"{self.name}(per={per!r}, backward={backward!r})")
        self.drop_prob, self.rule, self.per, self.compute = as_schedule(drop_prob), rule, per, compute
        self.forward, self.mask, self.data, self.update, self.rest = forward, mask, data, update, rest
        self.backward, self.norms, self.stillness = backward, norms, stillness
        self.alternation = Alternation(warmup, drop_steps, period)
        self.consistency = float(consistency)
        self.kind: Kind = "plain"
        self._compare = Consistency(self.model)
        self.plain_steps, self._looping, self._cut = 0, False, False
        self._split: SampleFreeze | None = None
        self.lr_scale, self._rates = lr_scale, Rates(lr_scale)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches to train on, one per optimizer step; ``data="same"`` repeats each."""
        self._looping = True
        if self._cut:  # the last loop was left in the middle of a batch's steps: they do not go on with another
            self.steps += self.alternation.repeats(self.steps)
        self._cut = self.data == "same"
        try:
            for batch in loader:
                for _ in range(self.alternation.repeats(self.steps) if self.data == "same" else 1):
                    yield batch
            self._cut = False
        finally:
            self._looping = False
            self._cut = self._cut and self.alternation.halfway(self.steps)

    def extra_loss(self, target: Any = None) -> Tensor | float:
        """Return the consistency term of a dropped-only step; 0 without one."""
        return self.consistency * self._compare.loss() if self.consistency else 0.0

    def metrics(self) -> dict[str, float]:
        """Return ``open_blocks`` in the latest step, and ``plain_steps``, in which nothing was drawn to drop."""
        return super().metrics() | {"plain_steps": float(self.plain_steps)}

    def state_dict(self) -> dict[str, Any]:
        """Return the step, plain steps, what a consistency term compares with, whether a loop was left in mid-batch."""
        mine = {"plain_steps": self.plain_steps, "teachers": list(self._compare.teachers)}
        return super().state_dict() | mine | {"cut": self._cut and not self._looping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` returned."""
        super().load_state_dict(state)
        self._cut = bool(state.get("cut", False))
        self.plain_steps = int(state["plain_steps"])
        self._compare.teachers = list(state["teachers"])

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        super()._arm(gates, undo)
        undo.callback(self._release)
        undo.callback(self.model.register_load_state_dict_post_hook(Hook(self._loaded)).remove)
        if self.consistency:
            self._compare.attach(undo)
        if self.per == "sample":
            self._arm_samples(gates)
            self._split = SampleFreeze(self.model, self.blocks, undo)

    def _on_step(self) -> None:
        assert self._gates is not None
        self._release()  # of a step that the optimizer never took
        self._parts.check(self.model, self.name)
        kind, draw_step = self.alternation.phase(self.steps)
        if self.data == "same" and kind != "plain" and not self._looping:
            raise AttachError('data="same" needs the loop `for batch in method.batches(loader)`.')
        draw_step = self.steps if self.mask == "fresh" else draw_step
        training = self._training = [gate.owner.training for gate in self._gates]
        dropped = self._dropped(draw_step, training)
        if kind != "plain" and not self._can_learn(kind, dropped):
            kind, self.plain_steps = "plain", self.plain_steps + 1
        self.kind = kind
        self._compare.start(teaching={"drop": True, "dropped-only": False}.get(kind))
        if kind == "drop":
            self._begin_drop(self._gates, dropped, self._probs(draw_step), draw_step)
        elif kind == "dropped-only":
            self._begin_dropped_only(self._gates, dropped, self._probs(draw_step), draw_step)
        else:
            self._close(self._gates, [False] * len(dropped), None)
        self._scale_eval()

    def _dropped(self, step: int, training: list[bool]) -> list[bool]:
        """Return which blocks are in the draw of ``step``: of those in train mode, that can drop for some sample."""
        probs = self._probs(step)
        drawn = draw_closed(probs, self.seed, step) if self.per == "batch" else [prob > 0 for prob in probs]
        return [is_drawn and trains for is_drawn, trains in zip(drawn, training, strict=True)]

    def _can_learn(self, kind: Kind, dropped: list[bool]) -> bool:
        """Whether there is anything to drop, and, in a dropped-only step, anything in it that the user lets learn."""
        places = {place for place, is_dropped in enumerate(dropped) if is_dropped}
        return bool(places) and (kind == "drop" or any(p.requires_grad for p in self._parts.parameters.any(places)))

    def _begin_drop(self, gates: Gates, dropped: list[bool], probs: list[float], step: int) -> None:
        if self.per == "sample":
            self._drop_samples(gates, probs, step)
            return
        self._close(gates, dropped, probs)
        self._freeze = self._parts.freeze(dropped, rest=False, stillness=self.stillness)

    def _begin_dropped_only(self, gates: Gates, dropped: list[bool], probs: list[float], step: int) -> None:
        still = [gate.owner.training and not is_dropped for gate, is_dropped in zip(gates, dropped, strict=True)]
        self._close(gates, still if self.forward == "dropped" else [False] * len(still), None)
        if self.update == "all":
            return
        if self.backward == "shortcuts":
            for gate, is_still in zip(gates, still, strict=True):
                if is_still and not gate.is_closed:
                    gate.apply(torch.Tensor.detach)
        if self._split is not None:
            self._masks.begin(probs, self.seed, step, scaled=False)
            self._split.masks = self._masks
        # Samples that dropped a block and samples that did not share its batch: then no statistics move at all.
        holders = () if self._split is None else self.model.modules()
        self._freeze = self._parts.freeze(
            still, rest=self.rest == "frozen", stillness=self.stillness, norms=self.norms, holders=holders
        )

    def _states(self, picked: list[bool]) -> Iterator[None]:
        assert self._gates is not None
        self._compare.start(teaching=None)
        for probs in self._typical():
            dropped = [pick and prob > 0 for pick, prob in zip(picked, probs, strict=True)]
            for begin in (self._begin_drop, self._begin_dropped_only):
                begin(self._gates, dropped, probs, self.steps)
                yield
                self._release()
        self._close(self._gates, [False] * len(picked), None)  # a plain step
        yield

    def _before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self._gates is not None
        check_modes(self._gates, self._training, self.name)
        if self._freeze is not None:
            self._freeze.check()
        if self._split is not None and (self.kind == "drop" or self._freeze is not None):
            self._parts.leave_out(self._masks.agreed(self._training, dropped=self.kind == "drop"), self.stillness)
        self._parts.leave_out_closed(self._gates, self.stillness)
        self._release()
        if self.kind == "dropped-only":
            self._rates.scale(optimizer)

    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        self._rates.restore()

    def _loaded(self, *_: Any) -> None:
        if self._freeze is not None:
            self._freeze.forget_buffers()

    def _release(self) -> None:
        """End what stands still in the current step."""
        self._rates.restore()
        if self._freeze is not None:
            self._freeze.release(self.model.training)
            self._freeze = None
        if self._split is not None:
            self._split.masks = None
