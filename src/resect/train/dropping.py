"""What the methods that close branches while training share: scaling, the test-time gate, the model's own dropping."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resect.blocks.axes import Axes
from resect.blocks.example import device_of
from resect.blocks.gate import Gates, Which
from resect.blocks.state import Gate
from resect.errors import check_all
from resect.train.fold import fold
from resect.train.freeze import Parts
from resect.train.masks import Compute, DropSamples, SampleMasks, check_batch_first
from resect.train.method import Method
from resect.train.own_drop import OwnDrop, take_over
from resect.train.problems import check_ends, choice_problems, count_problems
from resect.train.schedules import Constant, Rule, Schedule, drop_probs, probability
from resect.train.subset import norms_of, try_subsets

Scaling = Literal["none", "inverted", "paper"]
FEW_BLOCKS = 6
PAYS = 0.1
"""Below this probability, DINOv2's, cutting a batch saves little and is not free."""


class Dropping(Method):
    """A method that closes blocks while their owner trains; in eval mode every branch is open.

    ``scaling``, with p the probability that a block is closed:

    - ``none``: kept branches as they are, in training and in eval mode.
    - ``inverted``: kept branches times 1/(1 − p) in training, nothing in eval mode (timm, torchvision).
    - ``paper``: nothing in training, every branch times 1 − p in eval mode while attached (Huang 2016,
      eq. 5); ``finalize()`` folds the factors into the weights.
    """

    gate_mode = "training"
    compute: Compute = "auto"
    """How drop path leaves samples out: see ``StochasticDepth``."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Which,
        *,
        scaling: Scaling,
        seed: int,
        optimizer: Optimizer | None,
        own_drop: OwnDrop,
    ) -> None:
        super().__init__(model, blocks, optimizer)
        self.scaling, self.seed, self.own_drop = scaling, seed, own_drop
        self._eval_gates: Gates | None = None
        self._subsets: dict[str, Axes | str] = {}
        self._folded = False

    def _check(self, problems: list[str]) -> None:
        """Raise ``InputError`` with all problems: a subclass's own, and those of what is shared."""
        problems += choice_problems(scaling=(self.scaling, Scaling), own_drop=(self.own_drop, OwnDrop))
        problems += count_problems(seed=(self.seed, 0))
        check_all(problems, self.name)
        if self.scaling != "none":
            check_ends(self.blocks, f'{self.name}(scaling="{self.scaling}")')

    def _probs(self, step: int) -> list[float]:
        """Return per block the probability to be closed in a training step."""
        raise NotImplementedError

    def _typical(self) -> list[list[float]]:
        """Return per-block probabilities for all that a gate may have to do in some training step."""
        return [self._probs(0)]

    @property
    def drop_probs(self) -> dict[str, float]:
        """Return per block the probability to be closed, in the current step."""
        return dict(zip(self.blocks.names, self._probs(max(0, self.steps - 1)), strict=True))

    @property
    def computes(self) -> dict[str, str]:
        """Return per block how drop path computes it: ``subset``, or ``mask: `` and why. Known once attached."""
        return {name: f"mask: {found}" if isinstance(found, str) else "subset" for name, found in self._subsets.items()}

    def metrics(self) -> dict[str, float]:
        """Return ``open_blocks``: how many blocks were computed in the latest step."""
        return {"open_blocks": float(self.open_blocks)}

    def finalize(self) -> dict[str, float]:
        """Detach, and make what the method does in eval mode permanent; return the factor of every branch.

        With ``scaling="paper"`` the factors 1 − p are folded into the branches' weights and checked, once for each
        ``attach()``; with the others there is nothing to fold and all factors are 1.

        Raises ``ProofError`` if a branch cannot take its factor; the model is then unchanged.
        """
        factors = dict.fromkeys(self.blocks.names, 1.0)
        if self.scaling == "paper":
            factors = {name: 1.0 - prob for name, prob in self.drop_probs.items()}
        self.detach()
        if self.scaling == "paper" and not self._folded:
            fold(self.model, self.blocks, factors)
            self._folded = True
        return factors

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up the state that ``state_dict`` returned; draws and factors follow the step."""
        super().load_state_dict(state)
        self._scale_eval()

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        take_over(self.model, self.own_drop, self.name, undo)
        if len(self.blocks) < FEW_BLOCKS:
            warnings.warn(
                f"{self.name} on {len(self.blocks)} residual blocks: below {FEW_BLOCKS}, dropping branches tends to "
                "hurt more than it helps.",
                stacklevel=5,
            )
        self._folded = False
        self._parts = Parts(self.model, self.blocks)
        self._masks = SampleMasks([0.0] * len(self.blocks), device_of(self.model))
        self._drops = [DropSamples(self._masks, place) for place in range(len(self.blocks))]
        if self.scaling == "paper":
            self._eval_gates = Gates(self.model, self.blocks, holder=self.name, mode="eval")
            undo.callback(self._eval_gates.detach)
            self._scale_eval()

    def _arm_samples(self, gates: Gates) -> None:
        """Get ready to drop samples: see which branches can be computed on the others alone."""
        first = check_batch_first(self.model, self.blocks, self.name)
        self._subsets = try_subsets(self.model, self.blocks, gates, first, self.compute)
        for place, block in enumerate(self.blocks):
            # Batch norm cannot normalise a single value.
            self._masks.least[place] = 2 if norms_of(self.model, block) else 1

    def _on_step(self) -> None:
        assert self._gates is not None
        self._parts.check(self.model, self.name)
        for gate in self._gates:
            gate.served = False
        self._set_gates(self._gates, self.steps)
        self._scale_eval()

    def _set_gates(self, gates: Gates, step: int) -> None:
        """Let every gate do what the draws of ``step`` say."""
        raise NotImplementedError

    def _before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self._gates is not None
        self._parts.leave_out_closed(self._gates)

    def _states(self, picked: list[bool]) -> Iterator[None]:
        assert self._gates is not None
        for probs in self._typical():
            self._close(self._gates, [pick and prob > 0 for pick, prob in zip(picked, probs, strict=True)], probs)
            yield

    def _scale_eval(self) -> None:
        """Give the eval gates the factors of the current step."""
        if self._eval_gates is not None:
            for gate, prob in zip(self._eval_gates, self.drop_probs.values(), strict=True):
                gate.scale(_number(1.0 - prob))

    def detach(self) -> None:
        """Stop acting on the model, and leave it without a trace. Harmless when not attached."""
        super().detach()
        self._eval_gates = None

    def _close(self, gates: Gates, closed: list[bool], probs: list[float] | None) -> None:
        """Close some blocks and open the others, scaled up as their probabilities ask; None: not scaled."""
        for gate, is_closed, prob in zip(gates, closed, probs or [0.0] * len(closed), strict=True):
            if is_closed:
                gate.close()
            else:
                self._keep(gate, prob)

    def _drop_samples(self, gates: Gates, probs: list[float], step: int) -> None:
        """Drop every branch for the samples that ``step`` draws; one that all must drop is not computed."""
        self._masks.begin(probs, self.seed, step, scaled=self.scaling == "inverted")
        for gate, drop, prob in zip(gates, self._drops, probs, strict=True):
            axes = self._subsets.get(gate.block.name)
            if prob == 0:
                self._keep(gate, prob)
            elif prob == 1:
                gate.close()
            elif isinstance(axes, Axes) and (prob >= PAYS or self.compute == "subset"):
                gate.apply_on_rows(drop, axes)
            else:
                gate.apply(drop)

    def _keep(self, gate: Gate, prob: float) -> None:
        if self.scaling == "inverted" and 0 < prob < 1:
            gate.scale(_number(1.0 / (1.0 - prob)))
        elif gate.state != "open":
            gate.open()


class Scheduled(Dropping):
    """A method whose drop probabilities follow a schedule over training and a rule over depth."""

    drop_prob: Schedule
    rule: Rule

    def _probs(self, step: int) -> list[float]:
        return drop_probs(probability("drop_prob", self.drop_prob, step), self.rule, len(self.blocks))

    def _typical(self) -> list[list[float]]:
        """Between, 0 and 1, where a schedule moves it."""
        constant = isinstance(self.drop_prob, Constant)
        values = [self.drop_prob(0)] if constant else [0.5, 0.0, 1.0]
        return [drop_probs(value, self.rule, len(self.blocks)) for value in values]


def _number(value: float) -> Tensor:
    """Return a factor as a tensor (): code compiled for one step serves the next, where a schedule moves it."""
    return torch.tensor(value, dtype=torch.float64)
