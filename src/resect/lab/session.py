"""Everything that moves while a net trains, and what a checkpoint keeps of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from resect.lab import checkpoint
from resect.lab.data import ImageData, mean_std, normalize
from resect.lab.evaluate import check_fit
from resect.lab.methods import MakeMethod, Method, NoMethod
from resect.lab.optimize import make_optimizer
from resect.lab.recipe import Recipe
from resect.lab.sampler import Sampler

CHECKPOINT_SHARE = 0.05  # of the training time; a checkpoint that would cost more waits for a later epoch


@dataclass
class Session:
    """A training in progress. ``net`` is ``model`` as accelerate wraps it for several processes."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    sampler: Sampler
    images: Tensor  # the training split, on the device: uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    stats: tuple[Tensor, Tensor]  # mean and std per channel, on the device
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    writing: float = 0.0  # seconds spent on checkpoints by this process

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes, as a context."""
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.recipe.train.epochs * len(self.sampler)


def start(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, data: ImageData, make_method: MakeMethod
) -> Session:
    """A session before its first step: all on the device, the method made but not attached."""
    config, device = recipe.train, accelerator.device
    mean, std = mean_std(data.train)
    images, labels, stats = (
        data.train.images.to(device),
        data.train.labels.to(device),
        (mean.to(device), std.to(device)),
    )
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    example = normalize(images[: config.batch_size], *stats)  # max|f| grows with the batch
    check_fit(model, example, len(data.classes), recipe.model.name)
    sampler = Sampler(
        len(labels),
        config.batch_size,
        seed=config.seed,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    optimizer = make_optimizer(model, config)
    method = make_method(recipe.method, model, optimizer, example) if recipe.method else NoMethod()
    net, optimizer = accelerator.prepare(model, optimizer)
    return Session(recipe, accelerator, model, net, optimizer, method, sampler, images, labels, stats)


def restore(session: Session, saved: dict[str, Any]) -> None:
    """Put the session where `save` left another one; its method must be attached."""
    session.model.load_state_dict(saved["model"])
    session.optimizer.load_state_dict(saved["optimizer"])
    session.method.load_state_dict(saved["method"])
    session.sampler.load_state_dict(saved["sampler"])
    session.step, session.history = saved["step"], saved["history"]
    torch.set_rng_state(saved["rng"])
    if "cuda_rng" in saved and session.images.is_cuda:
        torch.cuda.set_rng_state(saved["cuda_rng"], session.images.device)


def save(session: Session, folder: Path) -> None:
    """Write a checkpoint of the session, unless it is too early for another one.

    Raises:
        FileError: it could not be written; the one before it is whole and in place.
    """
    trained = sum(row["seconds"] for row in session.history)
    last = session.step == session.steps
    if not session.accelerator.is_main_process or (not last and session.writing > CHECKPOINT_SHARE * trained):
        return
    begun = time.perf_counter()
    state: dict[str, Any] = {
        "recipe": session.recipe.dump(),
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "method": session.method.state_dict(),
        "sampler": session.sampler.state_dict(),
        "step": session.step,
        "history": session.history,
        "rng": torch.get_rng_state(),
    }
    if session.images.is_cuda:
        state["cuda_rng"] = torch.cuda.get_rng_state(session.images.device)
    checkpoint.save(folder, len(session.history), state)
    session.writing += time.perf_counter() - begun
