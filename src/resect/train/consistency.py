"""A term that draws the output of a dropped-only step to that of the drop step before it, on the same batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resect.blocks.hooks import Hook
from resect.blocks.recompute import is_recomputing
from resect.errors import InputError

_REMEDY = "Use the same micro-batches in both: loop over method.batches(loader)."


class Consistency:
    """Collects the model's outputs in drop steps; compares those of dropped-only steps with them, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.teachers: list[Tensor] = []
        self._student: Tensor | None = None
        self._seen = 0
        self._teaching: bool | None = None

    def attach(self, undo: ExitStack) -> None:
        """Watch the model's outputs until ``undo``."""
        undo.callback(self.model.register_forward_hook(Hook(self._hook)).remove)

    def start(self, *, teaching: bool | None) -> None:
        """Begin a step whose outputs teach, or learn, or (None) do neither."""
        self._teaching, self._student, self._seen = teaching, None, 0
        if teaching:
            self.teachers = []

    def loss(self) -> Tensor | float:
        """Return KL(teacher ‖ student), the mean over samples, of the latest forward pass; 0 if it teaches."""
        if self._student is None:
            return 0.0
        if self._seen > len(self.teachers):
            raise InputError(
                f"consistency: this step ran {self._seen} forward passes, its drop step {len(self.teachers)}. {_REMEDY}"
            )
        shapes = [tuple(logits.shape) for logits in (self._student, self.teachers[self._seen - 1])]
        if shapes[0] != shapes[1]:
            raise InputError(f"consistency: this step gives logits {shapes[0]}, its drop step {shapes[1]}. {_REMEDY}")
        student, teacher = F.log_softmax(self._student, 1), F.log_softmax(self.teachers[self._seen - 1], 1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._teaching is None or not module.training or is_recomputing():
            return
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise InputError(
                f"consistency compares logits (N, classes), but the model returns {type(output).__name__}. "
                "Leave consistency at 0 and add a term of your own to the loss."
            )
        if self._teaching:
            self.teachers.append(output.detach())
        else:
            self._student, self._seen = output, self._seen + 1
