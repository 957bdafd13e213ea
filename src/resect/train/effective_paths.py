"""Training with effective paths only: exactly k of n blocks in every batch.

Veit, Wilber, Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS 2016, section 5.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from resect.blocks.gate import Gates, Which
from resect.errors import InputError
from resect.train.draws import draw_subset
from resect.train.dropping import Dropping, OwnDrop, Scaling


class EffectivePaths(Dropping):
    """Compute exactly ``keep`` of the n blocks in each training step, a random subset; the others are closed.

    With 23 of 54 blocks, paths have Binomial(23, ½) branches, 99 % of them between 5 and 17: those that
    carry nearly all of the gradient. The paper trains ResNet-110 so to 5.96 % error on CIFAR-10, against
    6.10 % in full. How it scales at test time is not known: default none, so compare ``scaling="paper"``.

    Parameters
    ----------
    model, blocks: the model and its blocks (``find_blocks``).
    keep: how many blocks run in a step, 0 … n; n is plain training.
    scaling: ``"none"``, ``"inverted"`` (n/keep in training) or ``"paper"`` (keep/n at test time); see ``Dropping``.
    seed, optimizer, own_drop: as for ``StochasticDepth``.

    Raises
    ------
    InputError: ``keep`` is no whole number of 0 … n, or another wrong value; all of them at once.

    >>> method = resect.EffectivePaths(model, blocks, keep=23, optimizer=optimizer)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Which,
        *,
        keep: int,
        scaling: Scaling = "none",
        seed: int = 0,
        optimizer: Optimizer | None = None,
        own_drop: OwnDrop = "refuse",
    ) -> None:
        super().__init__(model, blocks, scaling=scaling, seed=seed, optimizer=optimizer, own_drop=own_drop)
        self.keep = keep
        self._check(keep_problems(keep, len(self.blocks)))
        if scaling == "paper" and keep == 0:
            raise InputError('keep=0 with scaling="paper" scales every branch to nothing. Keep at least one block.')

    def _probs(self, step: int) -> list[float]:
        return [1.0 - self.keep / len(self.blocks)] * len(self.blocks)

    def _set_gates(self, gates: Gates, step: int) -> None:
        stays = draw_subset(self.keep, len(self.blocks), self.seed, step)
        self._close(gates, [not stay for stay in stays], self._probs(step))


def keep_problems(keep: int, count: int) -> list[str]:
    """Say what is wrong with a number of blocks to keep out of ``count``, if anything."""
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= count:
        return [f"keep must be a whole number between 0 and {count}, the number of blocks, not {keep!r}"]
    return []
