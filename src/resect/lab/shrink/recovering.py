"""Train a cut net for a few epochs with the uncut one as its teacher: `resect shrink --recover`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import resect
from resect.analyse.streams import samples_of
from resect.blocks.measure import Progress
from resect.blocks.modes import kept_modes
from resect.errors import ResectError
from resect.lab.augment import augment
from resect.lab.open import Opened

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
    progress: Progress | None = None,
) -> float:
    """Train a cut model, in place, on the training data of the uncut one; return the mean loss of the last epoch.

    ``by="distil"``: on all samples. The loss is that of the teacher's logits (`resect.Distillation`, T = 4), and for
    images the cross entropy of the labels. AdamW, from 1e-3 down to 0 along a cosine; images are shifted and flipped as
    the recipe says.

    ``by="mimic"``: it learns the uncut one's features (`resect.mimic`) on the first ``limit`` samples, without labels;
    an epoch is as many steps of 64 as go through them once. The loss returned is that of the last step.

    Random numbers come from ``seed`` alone. Afterwards the model is in the modes that it was in.

    Raises:
        InputError: there are no data.
        ResectError: the loss is no longer finite.
    """
    if by == "mimic":
        samples = opened.batches("train", limit, SIZE)
        count = sum(map(samples_of, samples))
        steps = epochs * len(samples)
        losses = resect.mimic(small, opened.model, samples, steps=steps, samples=count, seed=seed, progress=progress)
        return losses[-1]
    batches, mean = opened.batches("train", None, SIZE), math.nan
    config = opened.recipe.train if opened.recipe is not None else None
    optimizer = torch.optim.AdamW(small.parameters(), lr=LR, weight_decay=1e-4)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = torch.Generator().manual_seed(seed)
    distil = resect.Distillation(small, opened.model)
    with kept_modes(small), torch.random.fork_rng(), distil:
        torch.manual_seed(seed)
        small.train()
        for epoch in range(epochs):
            total = 0.0
            for turn, place in enumerate(torch.randperm(len(batches), generator=draws).tolist()):
                batch: Any = batches[place]
                if isinstance(batch, Mapping):
                    small(**batch)
                    loss = torch.as_tensor(distil.extra_loss())
                else:
                    images, labels = batch
                    if config is not None:
                        images = augment(images, shift=config.shift, flip=config.flip, generator=draws)
                    loss = F.cross_entropy(small(images), labels) + distil.extra_loss()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                if progress:
                    progress(epoch * len(batches) + turn + 1, steps)
            mean = total / len(batches)
            if not math.isfinite(mean):
                raise ResectError(f"Recovering diverged in epoch {epoch + 1}: the loss is {mean}.")
    small.zero_grad()
    return mean
