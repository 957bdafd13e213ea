"""Train a cut net for a few epochs with the uncut one as its teacher: `resect shrink --recover`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resect
from resect.analyse.streams import samples_of
from resect.blocks.measure import Progress
from resect.blocks.modes import kept_modes
from resect.errors import ResectError
from resect.lab.augment import augment
from resect.lab.interrupt import Interrupted, stop_signals
from resect.lab.open import Opened
from resect.lab.shrink.unfinished import Unfinished

LR = 1e-3
SIZE = 64


def recover(
    small: nn.Module,
    opened: Opened,
    epochs: int,
    *,
    by: str = "distil",
    limit: int | None = None,
    seed: int = 0,
    kept: Unfinished | None = None,
    progress: Progress | None = None,
) -> float:
    """Train a cut model, in place, on the training data of the uncut one; return the mean loss of the last epoch.

    ``by="distil"``: on all samples. The loss is that of the teacher's logits (`resect.Distillation`, T = 4), and for
    images the cross entropy of the labels. AdamW, from 1e-3 down to 0 along a cosine; images are shifted and flipped as
    the recipe says. With ``kept`` it goes on from the state there, to the bit on the CPU, and leaves its own there,
    also when Ctrl-C or SIGTERM stop it after the step under way.

    ``by="mimic"``: it learns the uncut one's features (`resect.mimic`) on the first ``limit`` samples, without labels;
    an epoch is as many steps of 64 as go through them once. The loss returned is that of the last step. Only a
    recovery that is over is kept.

    Random numbers come from ``seed`` alone. Afterwards the model is in the modes that it was in.

    Raises:
        InputError: there are no data.
        Interrupted: it was stopped, and can go on.
        ResectError: the loss is no longer finite.
    """
    kept = kept or Unfinished()
    if by == "mimic":
        return _mimic(small, opened, epochs, limit, seed, kept, progress)
    course = _Course(small, opened, epochs, seed)
    with kept_modes(small), torch.random.fork_rng(), course.distil, stop_signals(kept.folder is not None) as stopped:
        torch.manual_seed(seed)
        small.train()
        if kept.state is not None:
            course.load(kept.state)
        while course.step < course.steps:
            course.advance()
            if progress:
                progress(course.step, course.steps)
            over, stop = course.step == course.steps, stopped()
            if kept.folder is not None and (over or stop or kept.due):
                course.check()
                kept.save(course.state())
            if stop:
                raise Interrupted(f"Stopped after step {course.step} of {course.steps} of recovery.")
    small.zero_grad()
    return course.check()


def _mimic(
    small: nn.Module, opened: Opened, epochs: int, limit: int | None, seed: int, kept: Unfinished,
    progress: Progress | None,
) -> float:  # fmt: skip
    if kept.state is None:
        samples = opened.batches("train", limit, SIZE)
        count, steps = sum(map(samples_of, samples)), epochs * len(samples)
        losses = resect.mimic(small, opened.model, samples, steps=steps, samples=count, seed=seed, progress=progress)
        kept.save({"model": dict(small.state_dict()), "loss": losses[-1]})
        return losses[-1]
    small.load_state_dict(kept.state["model"])
    return float(kept.state["loss"])


class _Course:
    """The training of a cut model by its uncut one, step by step, with all that a later process needs to go on."""

    def __init__(self, small: nn.Module, opened: Opened, epochs: int, seed: int) -> None:
        self.small, self.recipe = small, opened.recipe
        self.batches = opened.batches("train", None, SIZE)
        if len(self.batches) > 1 and samples_of(self.batches[-1]) == 1:
            del self.batches[-1]  # of one sample, batch norm has no deviation
        self.step, self.steps = 0, epochs * len(self.batches)
        self.optimizer = torch.optim.AdamW(small.parameters(), lr=LR, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.draws = torch.Generator().manual_seed(seed)
        self.distil = resect.Distillation(small, opened.model)
        self.order: list[int] = []
        self.losses: list[float] = []
        """Of this epoch."""

    def advance(self) -> None:
        """Take the next step."""
        turn = self.step % len(self.batches)
        if turn == 0:
            self.check()
            self.order, self.losses = torch.randperm(len(self.batches), generator=self.draws).tolist(), []
        loss = self._loss(self.batches[self.order[turn]])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.step += 1

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            self.small(**batch)
            return torch.as_tensor(self.distil.extra_loss())
        images, labels = batch
        if self.recipe is not None:
            config = self.recipe.train
            images = augment(images, shift=config.shift, flip=config.flip, generator=self.draws)
        return F.cross_entropy(self.small(images), labels) + self.distil.extra_loss()

    def check(self) -> float:
        """Return the mean loss of the epoch so far; raises ``ResectError`` where it is not finite."""
        mean = sum(self.losses) / max(1, len(self.losses))
        if not math.isfinite(mean):
            raise ResectError(f"Recovering diverged by step {self.step} of {self.steps}: the loss is {mean}.")
        return mean

    def state(self) -> dict[str, Any]:
        """Return all that changes: tensors and JSON data."""
        return {
            "model": dict(self.small.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "draws": self.draws.get_state(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "order": self.order,
            "losses": self.losses,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self.small.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.draws.set_state(state["draws"])
        torch.set_rng_state(state["random"])
        self.step, self.order, self.losses = state["step"], list(state["order"]), list(state["losses"])
