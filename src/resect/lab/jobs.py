"""Train several nets at once: one process each, one thread each, progress told to the parent."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch

import resect
from resect.blocks.plan import Plan
from resect.files import write_text
from resect.lab.data import in_batches, mean_std, normalize, open_data
from resect.lab.data import load as load_data
from resect.lab.memory import keep_freed_memory
from resect.lab.progress import Progress, Tell
from resect.lab.recipe import Recipe, parse
from resect.lab.removal import removal
from resect.lab.scratch import cut_shape
from resect.lab.trainer import TrainResult, train

Report = Callable[[str, int, int], None]
"""``report(name of the job, steps done, steps in all)``"""

PLAN_EPOCHS = 3
"""A block goes if it was muted in every step of this many last epochs."""

PLAN_IMAGES = 2048
"""Test images on which the plan's evidence has each branch's largest response."""


@dataclass(frozen=True)
class Job:
    """One training: by ``recipe`` (JSON), into ``folder``; with ``plan``, of the net cut by it from the start.

    With ``removals`` the trained net is tested without ever more of its blocks: ``removal.json`` in the folder.
    """

    name: str
    recipe: dict[str, Any]
    folder: Path
    plan: Path | None = None
    removals: bool = False


def run(job: Job, progress: Tell | None = None) -> TrainResult:
    """Train one net, or go on; a gated one leaves ``plan.json``, the blocks it has made superfluous, in its folder."""
    recipe = parse(job.recipe)
    model = cut_shape(recipe, Plan.load(job.plan)) if job.plan is not None else None
    result = train(recipe, job.folder, model=model, resume=True, progress=progress)
    write_plan(result, recipe)
    if job.removals:
        write_removals(result, recipe)
    return result


def write_removals(result: TrainResult, recipe: Recipe) -> None:
    """Write the test error without ever more blocks to ``removal.json``; those of a plan go first."""
    data = load_data(recipe.data.name, **recipe.data.options)
    stats = mean_std(data.train)
    blocks = resect.find_blocks(result.model, normalize(data.train.images[:64], *stats))
    plan = result.folder / "plan.json"
    gone = Plan.load(plan).names if plan.is_file() and not hasattr(result.model, "resect_plan") else []
    rows = removal(result.model, blocks, normalize(data.test.images, *stats), data.test.labels, gone=gone)
    write_text(result.folder / "removal.json", json.dumps(rows))


def write_plan(result: TrainResult, recipe: Recipe) -> None:
    """Write what a trained ε-gate found superfluous to ``plan.json`` in the run's folder.

    That of a net cut before says what is gone already.
    """
    if isinstance(result.method, resect.EpsilonGate) and not hasattr(result.model, "resect_plan"):
        steps_per_epoch = result.method.steps // len(result.history)
        steps = steps_per_epoch * min(PLAN_EPOCHS, len(result.history))
        images, labels = open_data(recipe.data.name, **recipe.data.options).sample("test", PLAN_IMAGES)
        data = in_batches(images, labels, recipe.train.batch_size)
        result.method.finalize(steps, data).save(result.folder / "plan.json")


class Pool:
    """Runs jobs, as many at a time as there are processors asked for; ``submit`` returns a future."""

    def __init__(self, workers: int, report: Report) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue: SimpleQueue[Any] = context.SimpleQueue()
        self._executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(self._queue,))
        self._listener = threading.Thread(target=self._listen, args=(report,), daemon=True)
        self._listener.start()

    def submit(self, job: Job) -> Future[None]:
        """Start a job, or queue it."""
        return self._executor.submit(_run_there, job)

    def _listen(self, report: Report) -> None:
        while (message := self._queue.get()) is not None:
            report(*message)

    def close(self, *, failed: bool) -> None:
        """End the processes; at once when something has failed."""
        if failed:
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=failed)
        self._queue.put(None)
        self._listener.join()


@contextmanager
def pool(workers: int, report: Report) -> Iterator[Pool]:
    """Give a ``Pool`` whose processes end with the ``with`` statement, at once on an exception."""
    running = Pool(workers, report)
    threads = torch.get_num_threads()
    # Threads that wait for a busy processor spin: several processes of two threads each crawl.
    torch.set_num_threads(1)
    failed = True
    try:
        yield running
        failed = False
    finally:
        torch.set_num_threads(threads)
        running.close(failed=failed)


_queue: SimpleQueue[Any] | None = None


def _begin(queue: SimpleQueue[Any]) -> None:
    """Prepare a worker: one thread, memory kept from step to step, and Ctrl-C left to the parent."""
    global _queue
    _queue = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()


def _run_there(job: Job) -> None:
    def tell(progress: Progress) -> None:
        if _queue is not None and progress.row is None:
            _queue.put((job.name, progress.step, progress.steps))

    run(job, tell)
