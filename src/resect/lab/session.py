"""Everything that moves while a net trains, and what a checkpoint keeps of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

import resect
from resect.lab import checkpoint, pace
from resect.lab.data import Data, Source, open_source
from resect.lab.evaluate import check_fit
from resect.lab.methods import MakeMethod, Method, NoMethod, make_distillation
from resect.lab.optimize import make_optimizer, param_groups
from resect.lab.recipe import Recipe
from resect.train.warmup import Warmable

CHECKPOINT_SHARE = 0.05  # of the training time; a checkpoint that would cost more waits


@dataclass
class Session:
    """A training in progress. ``net`` is ``model`` as accelerate and the compiler wrap it."""

    recipe: Recipe
    accelerator: Accelerator
    pace: pace.Pace
    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    source: Source
    distil: resect.Distillation | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None  # in place of `learning_rate`: steps every epoch
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch that were looked at
    seconds: float = 0.0  # of this epoch, up to the last look
    writing: float = 0.0  # seconds spent on checkpoints by this process
    saved_at: float = field(default_factory=time.perf_counter)

    def teaching(self) -> AbstractContextManager[Any]:
        """In it the teacher, if there is one, watches the net."""
        return self.distil or nullcontext()

    def extra_loss(self, target: torch.Tensor) -> torch.Tensor | float:
        """What the method and the teacher add to the loss of the latest forward pass."""
        return self.method.extra_loss(target) + (self.distil.extra_loss() if self.distil else 0.0)

    def metrics(self) -> dict[str, float]:
        """Numbers for the history, by name."""
        return self.method.metrics() | (self.distil.metrics() if self.distil else {})

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of the net and those that the method brings along."""
        return itertools.chain(self.model.parameters(), self.method.parameters())

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes, as a context."""
        return self.pace.autocast(self.accelerator.device)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.recipe.train.epochs * len(self.source)

    @property
    def affordable(self) -> bool:
        """Whether the checkpoints so far took little enough time for another one."""
        return self.writing <= CHECKPOINT_SHARE * (self.seconds + sum(row["seconds"] for row in self.history))

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint is so old that this process is to write one within an epoch."""
        age = time.perf_counter() - self.saved_at
        due = age >= 60 * self.recipe.train.checkpoint_minutes
        return due and self.accelerator.is_main_process and self.affordable

    @property
    def alone(self) -> bool:
        """Whether no other process trains with this one."""
        return self.accelerator.num_processes == 1

    def any(self, wish: bool) -> bool:
        """Whether some process has this wish: all of them must call this at the same step."""
        if self.alone:
            return wish
        return bool(self.accelerator.reduce(torch.tensor(float(wish), device=self.accelerator.device)).item())


def start(
    recipe: Recipe,
    accelerator: Accelerator,
    model: nn.Module,
    data: Data,
    make_method: MakeMethod,
    saved: dict[str, Any] | None,
    say: pace.Say,
) -> Session:
    """A session before its first step: all on the device, the method made but not attached.

    The pace is that of ``saved``, for a resume, or chosen now: see `pace.choose`.
    """
    config, device = recipe.train, accelerator.device
    source = open_source(data, config, device, accelerator.process_index, accelerator.num_processes)
    model.to(device)
    part = -(-config.batch_size // config.accumulate)
    example, labels = source.example(part)  # of this size, because max|f| grows with the batch
    check_fit(model, example, len(data.classes), recipe.model.name)
    steps = config.epochs * len(source)
    chosen = pace.Pace(**saved["pace"]) if saved else None
    if chosen is None and accelerator.is_main_process:  # the others wait, and do as it does
        chosen = pace.choose(recipe, model, example, labels, steps, say)
    (chosen,) = broadcast_object_list([chosen])
    if recipe.distill is not None and chosen.compile:
        chosen = replace(chosen, compile=False)  # the teacher watches what goes through the net
    chosen.lay_out(model)
    optimizer = make_optimizer(model, config)
    wanted = recipe.settled().method
    method = make_method(wanted, model, optimizer, example) if wanted else NoMethod()
    for group in param_groups(method.parameters(), config):
        optimizer.add_param_group(group)
    scheduler = None
    if config.schedule == "adaptive" and isinstance(method, resect.EpsilonGate):
        scheduler = resect.AdaptiveLR(optimizer, method)
    net, optimizer = accelerator.prepare(model, optimizer)
    if chosen.compile:
        net = pace.compiled(net, model, method)
    distil = make_distillation(recipe.distill, model)
    return Session(recipe, accelerator, chosen, model, net, optimizer, method, source, distil, scheduler)


def warm_up(session: Session) -> None:
    """Compile what the attached method will do to the blocks; nothing where the net is not compiled block by block."""
    if session.pace.compile and isinstance(session.method, Warmable):
        config = session.recipe.train
        with session.autocast():
            session.method.warmup(session.source.example(-(-config.batch_size // config.accumulate)))


def restore(session: Session, saved: dict[str, Any]) -> None:
    """Put the session where `save` left another one; its method must be attached."""
    session.model.load_state_dict(saved["model"])
    session.optimizer.load_state_dict(saved["optimizer"])
    session.method.load_state_dict(saved["method"])
    session.source.load_state_dict(saved["source"])
    if session.scheduler is not None:
        session.scheduler.load_state_dict(saved["scheduler"])
    session.step, session.history = saved["step"], saved["history"]
    session.losses, session.seconds = saved["losses"], saved["seconds"]
    torch.set_rng_state(saved["rng"])
    if "cuda_rng" in saved and session.accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"], session.accelerator.device)


def save(session: Session, folder: Path) -> None:
    """Write a checkpoint of the session, between two steps, all of whose losses were looked at.

    Raises:
        FileError: it could not be written; the one before it is whole and in place.
    """
    if not session.accelerator.is_main_process:
        return
    begun = time.perf_counter()
    state: dict[str, Any] = {
        "recipe": session.recipe.dump(),
        "pace": asdict(session.pace),
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "scheduler": session.scheduler.state_dict() if session.scheduler is not None else None,
        "method": session.method.state_dict(),
        "source": session.source.state_dict(),
        "step": session.step,
        "history": session.history,
        "losses": session.losses,
        "seconds": session.seconds,
        "rng": torch.get_rng_state(),
    }
    if session.accelerator.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(session.accelerator.device)
    checkpoint.save(folder, session.step, state)
    session.saved_at = time.perf_counter()
    session.writing += session.saved_at - begun
