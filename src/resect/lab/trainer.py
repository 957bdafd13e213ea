"""The reference trainer: one readable loop on accelerate, exact resume."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

import resect
from resect.blocks.modes import kept_modes
from resect.lab import pace, runs
from resect.lab.data import Data, open_data
from resect.lab.evaluate import error_on
from resect.lab.interrupt import Interrupted, stop_signals
from resect.lab.methods import MakeMethod, Method, leaves_out, make_method, make_permanent
from resect.lab.progress import Progress, Tell
from resect.lab.recipe import Recipe
from resect.lab.session import Session, restore, save, start, warm_up
from resect.lab.steps import check_losses, check_weights, train_step

LOOK_EVERY = 50  # steps between looks at the losses: each look waits for the device


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
    data: Data | None = None,
    method_factory: MakeMethod = make_method,
    resume: bool = False,
    interruptible: bool = False,
    progress: Tell | None = None,
    say: pace.Say = lambda text: None,
) -> TrainResult:
    """Train by ``recipe``; leaves model.safetensors, recipe.json, history.csv and metrics.json in ``folder``.

    Args:
        recipe: from `recipe.read`.
        folder: made if missing; holds the last checkpoint and the event files of TensorBoard as well.
        model: trained in place of the recipe's; its train or eval modes are restored afterwards. A model
            built here comes back in eval mode.
        data: used in place of the recipe's.
        method_factory: makes the method, where the recipe has one.
        resume: continue from the checkpoint in ``folder``, or start if there is none. On the CPU the outcome
            is bit-identical to that of a run that was never interrupted, after whichever step it was.
        interruptible: on Ctrl-C or SIGTERM finish the step under way, write a checkpoint and raise
            `Interrupted`; a second one ends at once. For the main thread.
        progress: told after every optimizer step, and once more after every epoch.
        say: told in a sentence what was measured, or cannot be done, at the start.

    Rows of the history: epoch (from 1), lr (of its last step), train_loss (mean), the method's metrics after
    the last step, seconds (of training alone), images_per_second, test_error (top-1, %).

    Raises:
        InputError: a wrong name, option or size, or a folder that holds another run.
        FileError: a damaged or unwritable file.
        Interrupted: see ``interruptible``.
        ResectError: the loss or a weight is no longer finite; the last good checkpoint stays.
    """
    folder = Path(folder)
    with runs.run_folder(folder):
        saved = runs.begin(folder, recipe, resume)
        data = data or open_data(recipe.data.name, **recipe.data.options)
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=leaves_out(recipe.method))]
        accelerator = Accelerator(log_with=_tracker(recipe, say), project_dir=folder, kwargs_handlers=handlers)
        cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):  # the caller's random numbers are not ours to use up
            torch.manual_seed(recipe.train.seed)
            model = runs.starting_model(recipe, data).eval() if model is None else model
            with kept_modes(model):
                session = start(recipe, accelerator, model, data, method_factory, saved, say)
                stops, told = stop_signals(interruptible), pace.explained(session.pace)
                with session.method, session.teaching(), stops as stopped, told:
                    warm_up(session)
                    if saved:
                        restore(session, saved)
                    try:
                        run_epochs(session, folder, stopped, progress)
                    finally:
                        accelerator.end_training()
        make_whole(session, say)
        if accelerator.is_main_process:
            more = asdict(session.pace) | {"device": str(accelerator.device), "torch": torch.__version__}
            more["classes"] = list(data.classes)
            runs.finish(folder, recipe, model, session.history, **more)
    return TrainResult(model, session.history, session.method if recipe.method else None, folder)


def make_whole(session: Session, say: pace.Say) -> None:
    """Make the net as it is saved the one that is tested: fold test-time factors in, renew batch statistics."""
    make_permanent(session.method, say)
    batches = getattr(session.recipe.method, "recalibrate", 0)
    if batches:
        with session.autocast():
            resect.recalibrate(session.model, itertools.islice(session.source, batches))
            session.history[-1]["test_error"] = error_on(session.model, session.source.test())
        say(f"Batch statistics of the full net renewed: test error {session.history[-1]['test_error']:.2f} %.")


def run_epochs(session: Session, folder: Path, stopped: Callable[[], bool], progress: Tell | None) -> None:
    """Train and evaluate the epochs that are left, with a checkpoint after each that affords one."""
    while len(session.history) < session.recipe.train.epochs:
        row = train_epoch(session, folder, stopped, progress)
        with session.autocast():
            row["test_error"] = error_on(session.model, session.source.test())
        session.history.append(row)
        session.losses, session.seconds = [], 0.0
        if session.scheduler is not None:
            session.scheduler.step()
        _log(session, row)
        over, stop = session.step == session.steps, session.any(stopped())
        if over or stop or session.affordable:
            save(session, folder)
        if progress:
            progress(Progress(session.step, session.steps, session.method, row))
        if stop and not over:
            raise _interrupted(session)


def train_epoch(session: Session, folder: Path, stopped: Callable[[], bool], progress: Tell | None) -> dict[str, Any]:
    """The steps left in this epoch; returns the epoch's row of the history, without the test error.

    Losses stay on the device until they are looked at: every now and then, and before each checkpoint.
    """
    epoch, batches = session.source.epoch, len(session.source)
    pending: list[Tensor] = []
    begun = time.perf_counter() - session.seconds
    session.net.train()
    for batch in session.source:
        pending.append(train_step(session, batch))
        session.step += 1
        if progress:
            progress(Progress(session.step, session.steps, session.method))
        last = len(session.losses) + len(pending) == batches
        # Several processes must agree: they ask each other where they look at the losses anyway.
        asked = session.alone and (stopped() or session.overdue)
        if not (asked or last or len(pending) == LOOK_EVERY):
            continue
        session.losses += session.accelerator.reduce(torch.stack(pending), "mean").tolist()
        session.seconds = time.perf_counter() - begun
        pending.clear()
        check_losses(session, epoch, folder)
        stop = session.any(stopped())
        keep = stop or session.any(session.overdue)
        if last or keep:
            check_weights(session, epoch, folder)
        if keep and not last:  # after the last step the end of the epoch sees to it
            save(session, folder)
            begun = time.perf_counter() - session.seconds  # writing is no training
            if stop:
                raise _interrupted(session)
    return {
        "epoch": epoch + 1,
        "lr": session.optimizer.param_groups[0]["lr"],
        "train_loss": sum(session.losses) / batches,
        **session.metrics(),
        "seconds": round(session.seconds, 4),
        "images_per_second": round(batches * session.recipe.train.batch_size / session.seconds, 1),
    }


def _interrupted(session: Session) -> Interrupted:
    return Interrupted(f"Stopped after step {session.step} of {session.steps}; the checkpoint is written.")


def _tracker(recipe: Recipe, say: pace.Say) -> str | None:
    if recipe.train.tensorboard and not find_spec("tensorboard"):
        say("TensorBoard is not installed, so no event files are written (pip install tensorboard).")
        return None
    return "tensorboard" if recipe.train.tensorboard else None


def _log(session: Session, row: dict[str, Any]) -> None:
    """Write a row to the tracker, which is made for the first one; rows of a run that was cut off go."""
    if not session.accelerator.trackers:
        kept = {"tensorboard": {"purge_step": row["epoch"]}}
        session.accelerator.init_trackers("tensorboard", init_kwargs=kept)
    session.accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=row["epoch"])
