"""Distillation: the uncut model teaches the cut one, by an extra loss in the user's own loop.

Logits after Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531), section
2; features by their squared distance (Romero et al. 2015, arXiv 1412.6550), without a regressor between the two: a cut
model has the widths of the uncut one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resect.blocks.example import device_of, to_device
from resect.blocks.features import Place, check_place, tapped
from resect.blocks.hooks import Hook
from resect.blocks.modes import kept_modes
from resect.blocks.recompute import is_recomputing
from resect.blocks.unwrap import unwrap
from resect.errors import AttachError, InputError, check_all
from resect.shrink.history import name_in
from resect.shrink.mimic import distance

OUTPUT = "output"


class Distillation:
    """Adds to the loss how far a model is from its teacher, in logits and in features.

    ``extra_loss() = logits · T² · KL(softmax(z_teacher / T) ‖ softmax(z / T)) + weight · Σ mean (h − h_teacher)²``

    KL is the mean over all predictions of a batch (samples, or tokens), the last dimension the classes; the sum is over
    ``features``. With an ``attention_mask`` (B, T) among the keyword arguments, tokens that it hides do not count. It
    works beside a training method, in any loop, with any wrapper of the student:

    >>> with resect.Distillation(small, model, temperature=4) as distil:
    ...     for x, y in loader:
    ...         loss = loss_fn(small(x), y) + distil.extra_loss()

    Parameters
    ----------
    student: the model that trains.
    teacher: the model to learn from, run without gradients on what the student was called with; in eval mode while
        attached, otherwise untouched. It may be on another device, or of another dtype.
    logits: the weight of the first term; 0 leaves it out.
    temperature: T, above 0.
    features: modules of the *teacher* whose outputs are compared: "layer3", "blocks.5", before the head "model.norm".
    weight: the weight of the second term.

    Raises
    ------
    InputError: a wrong number or name, models that share weights, or (from ``extra_loss``) outputs that do not fit.
    AttachError: ``extra_loss`` without a forward pass in train mode, or a pass whose loss was never asked for.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        logits: float = 1.0,
        temperature: float = 4.0,
        features: Iterable[str] = (),
        weight: float = 1.0,
    ) -> None:
        self.student, self.teacher = unwrap(student), unwrap(teacher)
        self.logits, self.temperature, self.weight = logits, temperature, weight
        self.features = (features,) if isinstance(features, str) else tuple(features)
        self._check()
        self._there = {name: Place(name) for name in self.features} | {OUTPUT: Place("")}
        self._here = {name: Place(name_in(self.student, name)) for name in self.features} | {OUTPUT: Place("")}
        self._called: tuple[Any, Any, torch.autocast, dict[str, Tensor]] | None = None
        self._own: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._attached = False
        self._undo = ExitStack()

    def _check(self) -> None:
        low = {"logits": self.logits, "weight": self.weight, "temperature": self.temperature}
        problems = [
            f"{name} must be a number {'above 0' if name == 'temperature' else 'of at least 0'}, not {value!r}"
            for name, value in low.items()
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
            or (name == "temperature" and value == 0)
        ]  # fmt: skip
        if not problems and not self.logits and not (self.features and self.weight):
            problems = ["nothing is compared: give logits above 0, or features"]
        check_all(problems, "Distillation")
        for name in self.features:
            check_place(self.teacher, name)
        own = {id(parameter) for parameter in self.student.parameters()}
        if any(id(parameter) in own for parameter in self.teacher.parameters()):
            raise InputError("Student and teacher share weights. Teach with a copy: copy.deepcopy(model).")
        if any(parameter.is_meta for parameter in self.teacher.parameters()):
            raise InputError("The teacher is on the meta device, so it knows nothing. Load its weights.")

    @property
    def attached(self) -> bool:
        """Whether forward passes of the student are watched now."""
        return self._attached

    def attach(self) -> Self:
        """Start watching the student; the teacher goes into eval mode."""
        if self._attached:
            raise AttachError("This Distillation is attached already. Call detach() first.")
        with ExitStack() as undo:
            undo.enter_context(kept_modes(self.teacher))
            self.teacher.eval()
            self._own = undo.enter_context(tapped(self.student, self._here))
            hook = self.student.register_forward_hook(Hook(self._watch), with_kwargs=True)
            undo.callback(hook.remove)
            self._undo = undo.pop_all()
        self._attached, self._called = True, None
        return self

    def detach(self) -> None:
        """Stop watching; the teacher gets its modes back. Harmless when not attached."""
        self._attached, self._called = False, None
        self._undo.close()
        self._own = {}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def begin_step(self) -> None:
        """Check that the loss of the latest forward pass was asked for; there is nothing to draw."""
        if self._called is not None:
            raise AttachError(
                "Distillation: extra_loss() was not called after the latest forward pass, so nothing was distilled. "
                "Write loss = loss_fn(student(x), y) + distil.extra_loss()."
            )

    def extra_loss(self, target: Any = None) -> Tensor | float:
        """Run the teacher on what the student was just called with; return the loss, (). 0 while the student evaluates.

        ``target`` is not used: the methods' interface has it.
        """
        if not self.student.training:
            return 0.0
        if self._called is None:
            raise AttachError(
                "Distillation.extra_loss() comes after a forward pass of the student in train mode, inside `with "
                "distil:`, once for each."
            )
        (args, kwargs, precision, own), self._called = self._called, None
        inputs = _as_taken(self.teacher, (args, kwargs), precision)
        with torch.no_grad(), precision, tapped(self.teacher, self._there) as wanted:
            self.teacher(*inputs[0], **inputs[1])
        counted = kwargs.get("attention_mask")
        parts: dict[str, Tensor] = {}
        if self.logits:
            value = divergence(*_kept(own[OUTPUT], wanted[OUTPUT], counted), self.temperature)
            parts["distil_logits"] = self.logits * value
        if self.features and self.weight:
            pairs = [_kept(own[name], wanted[name], counted) for name in self.features]
            parts["distil_features"] = self.weight * torch.stack([distance(*pair) for pair in pairs]).sum()
        self._latest = {name: part.detach() for name, part in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield nothing: distillation brings no weights."""
        return iter(())

    def metrics(self) -> dict[str, float]:
        """Return the two terms of the latest ``extra_loss``, weighted."""
        return {name: float(part) for name, part in self._latest.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume must find again: the options; there is nothing else."""
        return {
            "logits": self.logits,
            "temperature": self.temperature,
            "features": list(self.features),
            "weight": self.weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a state was saved with the same options; raises ``InputError`` otherwise."""
        now = self.state_dict()
        differing = [f"{key} was {state.get(key)!r}, and is {now[key]!r}" for key in now if state.get(key) != now[key]]
        check_all(differing, "This state was saved by a Distillation that was made otherwise")

    def _watch(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Keep what a pass that trains was called with, and what it gave, until its loss is asked for."""
        if is_recomputing():
            return
        own = dict(self._own)
        self._own.clear()
        if self.student.training and torch.is_grad_enabled():
            device = (device_of(self.student) or torch.device("cpu")).type
            precision = torch.autocast(
                device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
            )
            self._called = (args, kwargs, precision, own)


def divergence(own: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(wanted / T) ‖ softmax(own / T)) over the last dimension, the mean over all others."""
    if own.shape != wanted.shape:
        raise InputError(
            f"The student gives {tuple(own.shape)} and its teacher {tuple(wanted.shape)}: they must predict the same "
            "classes. Distil features alone: logits=0."
        )
    log_own, log_wanted = (F.log_softmax(z.float() / temperature, -1).flatten(0, -2) for z in (own, wanted))
    return F.kl_div(log_own, log_wanted, reduction="batchmean", log_target=True) * temperature**2


def _as_taken(model: nn.Module, inputs: Any, precision: torch.autocast) -> Any:
    """Move a call's tensors to where the model is, and numbers to its dtype, where autocast does not see to that."""
    inputs = to_device(tree_map_only(Tensor, Tensor.detach, inputs), device_of(model))
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    if dtype is None or precision._enabled:
        return inputs
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)


def _kept(own: Tensor, wanted: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Return both without what an attention mask hides, where they have its shape; the second on the first's device."""
    wanted = wanted.to(own.device)
    if isinstance(mask, Tensor) and mask.ndim == 2 and own.shape[:2] == wanted.shape[:2] == mask.shape:
        mask = mask.to(own.device).bool()
        return own[mask], wanted[mask]
    return own, wanted
