"""The training method of a recipe, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import resect
from resect.errors import ResectError
from resect.lab.config.distill import DistillConfig
from resect.lab.config.method import MethodConfig
from resect.train.dropping import Dropping


class Method(AbstractContextManager[Any], Protocol):
    """What the trainer asks of a method; it acts on the model inside ``with method:``."""

    def begin_step(self) -> None:
        """Once per optimizer step, before the forward pass."""

    def extra_loss(self, target: Any = None) -> Tensor | float:
        """What the method adds to the loss of this step; ``target``: the labels."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights that the method brings along, for the optimizer."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the history, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON data, nested at will: what a resume needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""


CLASSES: dict[str, Callable[..., Any]] = {
    "stochastic-depth": resect.StochasticDepth,
    "residual-droppath": resect.ResidualDroppath,
    "epsilon-gate": resect.EpsilonGate,
    "effective-paths": resect.EffectivePaths,
    "random-subset": resect.RandomSubset,
}
MakeMethod = Callable[[MethodConfig, nn.Module, torch.optim.Optimizer, Tensor], Method]


def make_method(config: MethodConfig, model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor) -> Method:
    """The method of a recipe on the residual blocks of ``model``; ``example`` is a training batch."""
    blocks = resect.find_blocks(model, example)
    if config.blocks == "identity":
        blocks = blocks.kind("identity")
    made: Method = CLASSES[config.name](model, blocks, optimizer=optimizer, **config.options())
    return made


def make_distillation(config: DistillConfig | None, model: nn.Module) -> resect.Distillation | None:
    """The recipe's teacher for ``model``, on its device; None where the recipe has none.

    Raises:
        InputError: the teacher predicts other classes, or has no such modules.
        FileError: its folder is neither a run nor a cut model.
    """
    if config is None:
        return None
    from resect.lab.open import open_model

    teacher = open_model(config.teacher).model.to(next(model.parameters()).device)
    return resect.Distillation(model, teacher, **config.options())


def leaves_out(config: MethodConfig | None) -> bool:
    """Whether some weights of the net get no gradient in some steps: then several processes must not wait for it."""
    return config is not None and (config.name != "epsilon-gate" or config.skip_muted_after is not None)


def make_permanent(method: Method, say: Callable[[str], None]) -> None:
    """Fold what a detached method does in evaluation into the weights, so that the saved net is the one evaluated."""
    if isinstance(method, Dropping) and method.scaling == "paper":
        try:
            method.finalize()
        except ResectError as error:
            say(f"The saved net lacks the test-time scaling: {error}")


class NoMethod:
    """Plain training."""

    def __enter__(self) -> NoMethod:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo."""

    def begin_step(self) -> None:
        """Nothing to draw."""

    def extra_loss(self, target: Any = None) -> float:
        """Nothing to add."""
        return 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """No weights."""
        return iter(())

    def metrics(self) -> dict[str, float]:
        """Nothing to report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
