"""Stochastic depth and drop path: random branches closed in every training step.

Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from torch import nn
from torch.optim import Optimizer

from resect.blocks.gate import Gates, Which
from resect.train.draws import draw_closed
from resect.train.dropping import OwnDrop, Scaling, Scheduled
from resect.train.masks import Compute, Per
from resect.train.problems import check_ends, number_problems, per_problems
from resect.train.schedules import Rule, Schedule, as_schedule, rule_problems


class StochasticDepth(Scheduled):
    """Close every block l with probability p_l in each training step: ``x + b_l·f_l(x)``, ``b_l ~ Bernoulli(1 − p_l)``.

    Parameters
    ----------
    model, blocks: the model and its blocks (``find_blocks``).
    drop_prob: the last block's probability under the linear rules, every block's under ``uniform``; a
        number in [0, 1] or a schedule of the step (``resect.train.schedules``). Huang's p_L is ``1 − drop_prob``.
        0 is plain training, 1 with ``rule="uniform"`` closes all.
    rule: ``"linear"`` (Huang, eq. 4: ``p_l = (l/L)·drop_prob``), ``"linear-from-zero"`` (timm: the first
        block never drops), ``"uniform"``, or one share per block.
    per: ``"batch"`` (Huang 2016): one draw per block and step; a closed block is not computed, its gradients
        are None, its buffers stand still. ``"sample"`` (drop path): one draw per block and sample.
    compute: with ``per="sample"``, how dropped samples are left out. ``"mask"``: the branch is computed on all and
        multiplied by 0. ``"subset"``: it is computed on the kept samples (at least one) and added to those; everything
        it is given is cut to them, also masks and positions. Draws, values and gradients are the mask's but for
        rounding, and for the random numbers of dropout inside the branch. A branch with batch norm then takes its
        statistics of the kept samples alone (at least two). ``"auto"``: the subset where ``attach()`` saw on the
        example that it comes to the same as the mask, and from a probability of 0.1 on; else, and with batch norm,
        the mask. ``method.computes`` says which, and why. What ``torch.compile`` compiles uses the mask.
    scaling: ``"inverted"``, ``"none"`` or ``"paper"``; see ``Dropping``.
    seed: all draws come from (seed, step): the same on every rank and after a resume.
    optimizer: whose steps ``begin_step()`` is checked against; by default every optimizer's that holds
        weights of the model.
    own_drop: what to do if the model has DropPath, StochasticDepth or LayerDrop of its own: ``"refuse"``,
        or ``"replace"`` it while attached.

    Raises
    ------
    InputError: every wrong value at once; or scaling, or ``per="sample"``, of a block without a usable end.
    AttachError: at ``attach()``, for a model that drops branches itself, a block that another method holds, a
        branch whose first dimension is not the batch (``per="sample"``), or one that ``compute="subset"`` asks for
        and that does not come to the same as the mask.

    >>> method = resect.StochasticDepth(model, blocks, drop_prob=0.5, optimizer=optimizer)
    >>> with method:
    ...     for x, y in loader:
    ...         method.begin_step()
    ...         loss_fn(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
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
        scaling: Scaling = "inverted",
        seed: int = 0,
        optimizer: Optimizer | None = None,
        own_drop: OwnDrop = "refuse",
    ) -> None:
        super().__init__(model, blocks, scaling=scaling, seed=seed, optimizer=optimizer, own_drop=own_drop)
        self.drop_prob, self.rule, self.per, self.compute = as_schedule(drop_prob), rule, per, compute
        self._moves = per == "batch"
        self._check(
            [
                *number_problems("drop_prob", drop_prob),
                *rule_problems(rule, len(self.blocks)),
                *per_problems(per, compute),
            ]
        )
        if per == "sample":
            check_ends(self.blocks, f'{self.name}(per="sample")')

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        super()._arm(gates, undo)
        if self.per == "sample":
            self._arm_samples(gates)

    def _set_gates(self, gates: Gates, step: int) -> None:
        probs = self._probs(step)
        if self.per == "batch":
            self._close(gates, draw_closed(probs, self.seed, step), probs)
        else:
            self._drop_samples(gates, probs, step)

    def _states(self, picked: list[bool]) -> Iterator[None]:
        if self.per == "batch":
            yield from super()._states(picked)
        elif not any(picked):  # nothing else to pick from: one gate function does all samples
            assert self._gates is not None
            for probs in self._typical():
                self._drop_samples(self._gates, probs, self.steps)
                yield
