"""What every training method shares: attach, detach, one step at a time, state in and out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resect.blocks.block import Blocks
from resect.blocks.gate import Gates, Which, resolve
from resect.errors import AttachError, BlocksError


class Method:
    """A training method: holds hyper-parameters, acts on a model while attached.

    Subclasses say what their gates do in ``_arm`` and what happens at a step in ``_on_step``. Nothing is
    added to the model: no parameter, no buffer, and after ``detach()`` no trace.
    """

    def __init__(self, model: nn.Module, blocks: Which, optimizer: Optimizer | None) -> None:
        self.model = model
        self.blocks: Blocks = resolve(model, blocks)
        if not self.blocks:
            raise BlocksError(f"{self.name} needs at least one residual block, and the selection is empty.")
        self.optimizer = optimizer
        self.steps = 0
        self._begun = False
        self._gates: Gates | None = None
        self._undo = ExitStack()

    @property
    def name(self) -> str:
        """Return the method's name, for messages."""
        return type(self).__name__

    @property
    def attached(self) -> bool:
        """Whether the method acts on the model now."""
        return self._gates is not None

    def attach(self) -> Self:
        """Start acting on the model. A failure leaves the model as it was."""
        if self.attached:
            raise AttachError(f"This {self.name} is attached already. Call detach() first.")
        with ExitStack() as undo:
            gates = Gates(self.model, self.blocks, holder=self.name, exclusive=True)
            undo.callback(gates.detach)
            self._arm(gates)
            if self.optimizer is not None:
                hook = self.optimizer.register_step_pre_hook(self._before_optimizer_step)
                undo.callback(hook.remove)
            self._undo = undo.pop_all()
        self._gates = gates
        self._begun = False
        return self

    def detach(self) -> None:
        """Stop acting on the model, and leave it without a trace. Harmless when not attached."""
        self._undo.close()
        self._gates = None

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def begin_step(self) -> None:
        """Begin an optimizer step: call once per step, before the forward pass; micro-batches share it."""
        if not self.attached:
            raise AttachError(
                f"{self.name}.begin_step() was called while not attached. Write `with method:` around the loop."
            )
        self._on_step()
        self.steps += 1
        self._begun = True

    def _before_optimizer_step(self, *_: Any) -> None:
        if not self._begun:
            raise AttachError(
                f"Two optimizer steps without {self.name}.begin_step() between them. "
                "Call method.begin_step() once per optimizer step, before the forward pass."
            )
        self._begun = False

    def extra_loss(self) -> Tensor | float:
        """Return what the method adds to the loss: 0 unless it says otherwise."""
        return 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the method itself brings: none unless it says otherwise."""
        return iter(())

    def metrics(self) -> dict[str, float]:
        """Return numbers worth logging now."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and JSON values that ``load_state_dict`` needs to go on exactly."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` returned."""
        self.steps = int(state["steps"])

    def _arm(self, gates: Gates) -> None:
        """Set the gates at attach."""
        raise NotImplementedError

    def _on_step(self) -> None:
        """Do what a new optimizer step asks for."""


def is_recomputing() -> bool:
    """Whether this forward pass is a recomputation inside a backward pass (gradient checkpointing)."""
    return torch._C._current_graph_task_id() != -1
