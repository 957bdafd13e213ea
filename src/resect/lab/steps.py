"""One optimizer step, and whether the training is still sound after it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resect.errors import ResectError
from resect.lab import checkpoint
from resect.lab.optimize import learning_rate
from resect.lab.session import Session


def train_step(session: Session, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One optimizer step on the images and labels of ``batch``; returns the loss () before it."""
    config, optimizer = session.recipe.train, session.optimizer
    total = torch.zeros((), device=session.accelerator.device)
    session.method.begin_step()
    for images, labels in zip(*(part.chunk(config.accumulate) for part in batch), strict=True):
        with session.autocast():
            logits = session.net(images)
        loss = F.cross_entropy(logits.float(), labels) + session.extra_loss(labels)
        loss = loss * (len(labels) / len(batch[1]))
        session.accelerator.backward(loss)
        total += loss.detach()
    if config.clip is not None:
        session.accelerator.clip_grad_norm_(session.parameters(), config.clip)
    if session.scheduler is None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(session.step, session.steps, config)
    optimizer.step()
    optimizer.zero_grad()
    return total


def check_losses(session: Session, epoch: int, folder: Path) -> None:
    """Raise unless every loss of this epoch so far is finite."""
    bad = next((index for index, loss in enumerate(session.losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise _diverged(session, f"loss {session.losses[bad]}", epoch, bad, folder)


def check_weights(session: Session, epoch: int, folder: Path) -> None:
    """Raise unless every weight is finite after the step just done."""
    if not all(parameter.isfinite().all() for parameter in session.parameters()):
        raise _diverged(session, "a weight that is not finite", epoch, len(session.losses) - 1, folder)


def _diverged(session: Session, what: str, epoch: int, index: int, folder: Path) -> ResectError:
    last = checkpoint.newest(folder)
    kept = f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"
    return ResectError(
        f"Training diverged: {what} in epoch {epoch + 1}, step {index + 1} of {len(session.source)}. "
        f"{kept}. Lower train.lr (now {session.recipe.train.lr}) and start again."
    )
