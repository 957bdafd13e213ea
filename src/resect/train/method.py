"""What every training method shares: attach, detach, one step at a time, state in and out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from resect.blocks.block import Blocks
from resect.blocks.gate import Gates, Which, resolve
from resect.blocks.state import Mode
from resect.blocks.units import reshard
from resect.blocks.unwrap import is_wrapped_compiled, unwrap
from resect.errors import AttachError, BlocksError, InputError
from resect.train.agree import check_options, compare, options, together, watch_wrapper
from resect.train.changed import Wiring
from resect.train.closure import Closure
from resect.train.compiling import CompiledCode
from resect.train.freeze import Freeze
from resect.train.warmup import Warmable

Batch = TypeVar("Batch")


class Method(Warmable):
    """A training method: holds hyper-parameters, acts on a model while attached.

    Subclasses say what their gates do in ``_arm``, what happens at a step in ``_on_step``, and what must be so
    when the optimizer looks in ``_on_optimizer_step``. Nothing is added to the model: no parameter, no buffer,
    and after ``detach()`` no trace.
    """

    gate_mode: Mode = None
    """When the method's gates act: while a block's owner trains, while it does not, or always."""

    def __init__(self, model: nn.Module, blocks: Which, optimizer: Optimizer | None) -> None:
        self.model = unwrap(model)
        self._wrapped = is_wrapped_compiled(model)
        self.blocks: Blocks = resolve(self.model, blocks)
        if not self.blocks:
            raise BlocksError(f"{self.name} needs at least one residual block, and the selection is empty.")
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise InputError(
                f"{self.name}(optimizer=…) takes one torch optimizer, bare or wrapped by accelerate or Lightning, not "
                f"a {type(optimizer).__name__}. Leave it out: every optimizer of the model's weights is watched."
            )
        self.optimizer = optimizer
        self.steps = 0
        self._begun = False
        self._stepped: set[int] = set()
        self._optimised: set[int] = set()
        self._closure: Closure | None = None
        self._stepping: FrameType | None = None  # in which an optimizer steps now
        self._gates: Gates | None = None
        self._freeze: Freeze | None = None
        self._compared = True
        self._undo = ExitStack()

    @property
    def name(self) -> str:
        """Return the method's name, for messages."""
        return type(self).__name__

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"<{self.name} on {len(self.blocks)} blocks, {self.steps} steps, {state}>"

    @property
    def attached(self) -> bool:
        """Whether the method acts on the model now."""
        return self._gates is not None

    @property
    def open_blocks(self) -> int:
        """How many blocks the latest training step computes; all of them while not attached."""
        return len(self.blocks) if self._gates is None else self._open

    def attach(self) -> Self:
        """Start acting on the model. A failure leaves the model as it was.

        Where several processes train together, all of them must call this: they compare what they attach.
        """
        if self.attached:
            raise AttachError(f"This {self.name} is attached already. Call detach() first.")
        try:
            with together(self):
                self._attach()
        except BaseException:
            self.detach()
            raise
        return self

    def _attach(self) -> None:
        """Start acting on the model, on this process alone."""
        reshard(self.model)
        with ExitStack() as undo:
            gates = Gates(self.model, self.blocks, holder=self.name, exclusive=True, mode=self.gate_mode)
            undo.callback(gates.detach)
            self._wiring = Wiring(self.model, self.blocks)
            self._code = CompiledCode(self.model, self.blocks, self.name, self._wrapped) if self._moves else None
            self._begun = False
            self._stepped.clear()
            self._arm(gates, undo)
            self._watch_optimizers(undo)
            watch_wrapper(self, undo)
            self._undo = undo.pop_all()
        self._gates, self._open = gates, len(gates)
        self._compared = True

    def detach(self) -> None:
        """Stop acting on the model, and leave it without a trace. Harmless when not attached."""
        self._gates = self._stepping = None
        self._undo.close()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def begin_step(self) -> None:
        """Begin an optimizer step: call once per step, before the forward pass; micro-batches share it.

        Raises ``AttachError`` while not attached, or if the model's modules were changed since.
        """
        if not self.attached:
            raise AttachError(
                f"{self.name}.begin_step() was called while not attached. Write `with method:` around the loop."
            )
        self._wiring.check(self.name)
        reshard(self.model)
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)
        if not self._compared:  # a state was loaded: a step off on one process, and draws differ
            compare(self)
        self._compared = True
        self._on_step()
        assert self._gates is not None
        if self._code is not None:
            self._code.begin(self._gates)
        self._open = sum(not (gate.is_closed and gate.acts) for gate in self._gates)
        self.steps += 1
        self._begun = True
        self._stepped.clear()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches to train on, one per optimizer step: those of ``loader``, unless a method repeats some."""
        yield from loader

    def extra_loss(self, target: Any = None) -> Tensor | float:
        """Return what the method adds to the loss: 0 unless it says otherwise. ``target``: the batch's labels."""
        return 0.0

    def wrap(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``loss_fn(output, target, ...)`` plus ``extra_loss(target)``, for loops that call the loss themselves.

        While the model is in eval mode it is ``loss_fn`` alone. Called with ``num_items_in_batch=N`` (transformers'
        Trainer: the targets of all micro-batches of the step, -100 not counted), the extra loss, a mean over this
        micro-batch, gets its share of N.

        >>> trainer = transformers.Trainer(model, arguments, compute_loss_func=method.wrap(loss_fn), ...)
        """

        @functools.wraps(loss_fn)
        def loss(output: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            value, total = loss_fn(output, target, *args, **kwargs), kwargs.get("num_items_in_batch")
            if not self.model.training:
                return value
            extra = self.extra_loss(target)
            return value + (extra if total is None else extra * (target.ne(-100).sum() / total))

        return loss

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the method itself brings: none unless it says otherwise."""
        return iter(())

    def metrics(self) -> dict[str, float]:
        """Return numbers worth logging now."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and JSON values that ``load_state_dict`` needs to go on exactly."""
        return {"steps": self.steps, "options": options(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` returned."""
        self._check_state(state)
        self.steps = int(state["steps"])
        self._compared = False

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise ``InputError`` before anything is loaded, if this is another method's state, or of other options."""
        missing, more = sorted(set(self.state_dict()) - set(state)), sorted(set(state) - set(self.state_dict()))
        if missing or more:
            raise InputError(
                f"This is not the state of such a {self.name}: it lacks {missing}, and has {more} beside. Make the "
                "method with the options that it was saved with."
            )
        check_options(self, state["options"])

    def _arm(self, gates: Gates, undo: ExitStack) -> None:
        """Set the gates at attach; what ``detach()`` must undo beside them goes into ``undo``."""
        raise NotImplementedError

    def _on_step(self) -> None:
        """Do what a new optimizer step asks for; ``self.steps`` is its number, from 0."""

    def _before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Do what must be done when all gradients of the step are there and the optimizer is about to look."""

    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Do what must be done right after an optimizer has moved the weights."""

    def _watch_optimizers(self, undo: ExitStack) -> None:
        """Be told of the steps of every optimizer that holds weights of the model, given or not."""
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)
            self._optimised = _held(self.optimizer)
            self._check_optimised()
        undo.callback(register_optimizer_step_pre_hook(self._pre_hook).remove)
        undo.callback(register_optimizer_step_post_hook(self._post_hook).remove)

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if not self._concerns(optimizer):
            raise AttachError(
                f"The optimizer given to {self.name} holds no parameter of the model. Make it of model.parameters(), "
                "and after sharding, or leave optimizer= out: every optimizer of the model's weights is watched."
            )

    def _concerns(self, optimizer: Optimizer) -> bool:
        held = _held(optimizer)
        return any(id(parameter) in held for source in (self.model, self) for parameter in source.parameters())

    def _check_optimised(self) -> None:
        """Raise ``AttachError`` if no optimizer that has stepped, or was given, holds the method's own parameters."""
        missing = [parameter for parameter in self.parameters() if id(parameter) not in self._optimised]
        if missing and self._optimised:
            raise AttachError(
                f"{self.name} brings parameters of its own ({sum(p.numel() for p in missing):,} weights), and no "
                "optimizer has them. Make the optimizer of [*model.parameters(), *method.parameters()]."
            )

    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = _caller()
        if not self._concerns(optimizer) or _inside(frame, self._stepping):
            return None
        # Several optimizers may share the model's weights: each steps once per begin_step().
        if not self._begun or id(optimizer) in self._stepped:
            missed = "Two optimizer steps without" if self._begun else "An optimizer step without"
            raise AttachError(
                f"{missed} {self.name}.begin_step() before {'the second' if self._begun else 'it'}. Call "
                "method.begin_step() once per optimizer step, before the forward pass; an engine's callback does it "
                "for you (resect.integrations)."
            )
        if self._code is not None and self._gates is not None:
            self._code.end(self._gates)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        look = functools.partial(self._before_optimizer_step, optimizer)
        self._closure = None if closure is None else Closure(closure, optimizer, look, self.name)
        self._stepping = frame
        self._stepped.add(id(optimizer))
        self._optimised |= _held(optimizer)
        if self._closure is None:
            return look()
        return (args[0],), {**kwargs, "closure": self._closure}

    def _post_hook(self, optimizer: Optimizer, *_: Any) -> None:
        if _caller() is self._stepping and self._concerns(optimizer):
            self._stepping = None
            if self._closure is not None:
                self._closure.check_called()
            self._after_optimizer_step(optimizer)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _caller() -> FrameType | None:
    """Return the frame that called the function which asks; None in a compiled optimizer step, where there is none."""
    return None if is_dynamo_compiling() else sys._getframe(2)


def _inside(frame: FrameType | None, outer: FrameType | None) -> bool:
    """Whether an optimizer steps within another's step: a subclass calls its parent's, a wrapper what it wraps."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None
