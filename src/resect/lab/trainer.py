"""The reference trainer: one readable loop on accelerate, images resident on the device, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from resect.blocks.modes import kept_modes
from resect.errors import ResectError
from resect.lab import checkpoint, runs
from resect.lab.augment import augment
from resect.lab.data import ImageData, normalize
from resect.lab.data import load as load_data
from resect.lab.evaluate import evaluate
from resect.lab.methods import MakeMethod, Method, make_method
from resect.lab.optimize import learning_rate
from resect.lab.recipe import Recipe
from resect.lab.sampler import generator_for
from resect.lab.session import Session, restore, save, start

Progress = Callable[[int, int, dict[str, Any] | None], None]

CHECK_EVERY = 50  # steps between looks at the losses: each look waits for the device


@dataclass(frozen=True)
class TrainResult:
    """A finished run; ``history`` as in `train`; ``method`` is detached, None where the recipe has none."""

    model: nn.Module
    history: list[dict[str, Any]]
    method: Method | None
    folder: Path


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    data: ImageData | None = None,
    method_factory: MakeMethod = make_method,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train by ``recipe``; leaves model.safetensors, recipe.json, history.csv and metrics.json in ``folder``.

    Args:
        recipe: from `recipe.read`.
        folder: made if missing; holds the last checkpoint as well.
        model: trained in place of the recipe's; its train or eval modes are restored afterwards. A model
            built here comes back in eval mode.
        data: used in place of the recipe's.
        method_factory: makes the method, where the recipe has one.
        resume: continue from the checkpoint in ``folder``, or start if there is none. On the CPU the outcome
            is bit-identical to that of a run that was never interrupted.
        progress: called as (steps done, steps in all, None) after every optimizer step, and with the new row
            of the history in place of None after every epoch.

    Rows of the history: epoch (from 1), lr (of its last step), train_loss (mean), the method's metrics after
    the last step, seconds (of training alone), images_per_second, test_error (top-1, %).

    Raises:
        InputError: a wrong name, option or size, or a folder that holds another run.
        FileError: a damaged or unwritable file.
        ResectError: the loss is no longer finite; the last good checkpoint stays.
    """
    folder, config = Path(folder), recipe.train
    saved = runs.begin(folder, recipe, resume)
    data = data or load_data(recipe.data.name, **recipe.data.options)
    tracker = "tensorboard" if config.tensorboard and find_spec("tensorboard") else None
    accelerator = Accelerator(log_with=tracker, project_dir=folder)
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # the caller's random numbers are not ours to use up
        torch.manual_seed(config.seed)
        model = runs.build_model(recipe, data).eval() if model is None else model
        with kept_modes(model):
            session = start(recipe, accelerator, model, data, method_factory)
            accelerator.init_trackers("tensorboard")
            with session.method:
                if saved:
                    restore(session, saved)
                while len(session.history) < config.epochs:
                    row = train_epoch(session, folder, progress)
                    with session.autocast():
                        row["test_error"] = evaluate(model, data.test.images, data.test.labels, stats=session.stats)
                    session.history.append(row)
                    accelerator.log(row, step=row["epoch"])
                    save(session, folder)
                    if progress:
                        progress(session.step, session.steps, row)
            accelerator.end_training()
    if accelerator.is_main_process:
        runs.finish(folder, recipe, model, session.history, device=str(accelerator.device), torch=torch.__version__)
    return TrainResult(model, session.history, session.method if recipe.method else None, folder)


def train_epoch(session: Session, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """One pass over the training split; returns its row of the history, without the test error."""
    config, method, optimizer = session.recipe.train, session.method, session.optimizer
    epoch, begun = session.sampler.epoch, time.perf_counter()
    generator = generator_for(f"augment-{session.accelerator.process_index}", config.seed, epoch)
    losses: list[float] = []
    pending: list[Tensor] = []
    rate = config.lr
    session.net.train()
    for indices in session.sampler:
        method.begin_step()
        indices = indices.to(session.images.device)
        images = augment(session.images[indices], shift=config.shift, flip=config.flip, generator=generator)
        with session.autocast():
            logits = session.net(normalize(images, *session.stats))
        loss = F.cross_entropy(logits.float(), session.labels[indices]) + method.extra_loss()
        session.accelerator.backward(loss)
        rate = learning_rate(session.step, session.steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        session.step += 1
        pending.append(loss.detach())
        if len(pending) == CHECK_EVERY or len(losses) + len(pending) == len(session.sampler):
            losses += session.accelerator.reduce(torch.stack(pending), "mean").tolist()
            pending.clear()
            check_finite(losses, session, epoch, folder)
        if progress:
            progress(session.step, session.steps, None)
    seconds = time.perf_counter() - begun
    return {
        "epoch": epoch + 1,
        "lr": rate,
        "train_loss": sum(losses) / len(losses),
        **method.metrics(),
        "seconds": round(seconds, 4),
        "images_per_second": round(len(losses) * config.batch_size / seconds, 1),
    }


def check_finite(losses: list[float], session: Session, epoch: int, folder: Path) -> None:
    """Raise unless every loss of this epoch so far is finite, and after its last step every weight too."""
    bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        what = f"loss {losses[bad]}"
    elif len(losses) == len(session.sampler) and not all(p.isfinite().all() for p in session.model.parameters()):
        bad, what = len(losses) - 1, "a weight that is not finite"
    else:
        return
    last = checkpoint.newest(folder)
    kept = f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"
    raise ResectError(
        f"Training diverged: {what} in epoch {epoch + 1}, step {bad + 1} of {len(session.sampler)}. "
        f"{kept}. Lower train.lr (now {session.recipe.train.lr}) and start again."
    )
