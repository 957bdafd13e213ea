"""The control of dropping: run the full net, update a random subset of its blocks.

Like LayerDropBack (arXiv 2412.18027): what dropping does to learning, without what it does to the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer

from resect.blocks.gate import Gates, Which
from resect.blocks.hooks import Hook
from resect.errors import check_all
from resect.train.draws import draw_subset
from resect.train.effective_paths import keep_problems
from resect.train.freeze import Parts, check_modes
from resect.train.method import Method


class RandomSubset(Method):
    """Compute every block, and let exactly ``keep`` of them learn in each training step, a random subset.

    The others stand still bit for bit (weights, buffers, momentum) while gradients flow through them. What
    belongs to no branch always learns. The control for ``StochasticDepth``, ``EffectivePaths`` and
    ``ResidualDroppath``; as there, only blocks whose owner is in train mode stand still.

    Parameters
    ----------
    model, blocks: the model and its blocks (``find_blocks``).
    keep: how many blocks learn in a step, 0 … n.
    seed, optimizer: as for ``StochasticDepth``.

    Raises ``InputError`` for a ``keep`` that is no whole number of 0 … n.

    >>> method = resect.RandomSubset(model, blocks, keep=27, optimizer=optimizer)
    """

    gate_mode = "training"

    def __init__(
        self, model: nn.Module, blocks: Which, *, keep: int, seed: int = 0, optimizer: Optimizer | None = None
    ) -> None:
        super().__init__(model, blocks, optimizer)
        check_all(keep_problems(keep, len(self.blocks)), self.name)
        self.keep, self.seed = keep, seed

    def metrics(self) -> dict[str, float]:
        """Return ``learning_blocks``: how many blocks learn in a step."""
        return {"learning_blocks": float(self.keep)}

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        self._parts = Parts(self.model, self.blocks)
        undo.callback(self._release)
        undo.callback(self.model.register_load_state_dict_post_hook(Hook(self._loaded)).remove)

    def _on_step(self) -> None:
        assert self._gates is not None
        self._release()
        self._parts.check(self.model, self.name)
        stays = draw_subset(self.keep, len(self.blocks), self.seed, self.steps)
        self._training = [gate.owner.training for gate in self._gates]
        still = [trains and not stay for trains, stay in zip(self._training, stays, strict=True)]
        self._freeze = self._parts.freeze(still, rest=False)

    def _states(self, picked: list[bool]) -> Iterator[None]:
        self._freeze = self._parts.freeze(picked, rest=False)
        yield
        self._release()

    def _before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self._gates is not None
        check_modes(self._gates, self._training, self.name)
        self._release()

    def _loaded(self, *_: Any) -> None:
        if self._freeze is not None:
            self._freeze.forget_buffers()

    def _release(self) -> None:
        if self._freeze is not None:
            self._freeze.release()
            self._freeze = None
