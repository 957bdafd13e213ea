"""Several processes that train together, started once and asked many things: importing torch is what takes time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 40  # seconds that a process waits for another one


class Processes:
    """``count`` processes that have joined a gloo group; call it to run a function of a test module on all of them."""

    def __init__(self, count: int, patience: float = PATIENCE) -> None:
        self.count, self.patience = count, patience
        self._running: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``function(*args)`` returns on every process; raise what it raises on the first that does."""
        outcomes = self.outcomes(function, *args)
        errors = [text for failed, text in outcomes if failed]
        if errors:
            self.close()  # they may wait for each other: the next ones start afresh
            raise AssertionError("\n".join(f"--- process {rank} ---\n{text}" for rank, text in enumerate(errors)))
        return [value for _, value in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """Return per process (whether it raised, what it returned or the traceback); one that died has raised."""
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send_bytes(pickle.dumps((function, args)))
        return [self._answer(pipe) for _, pipe in self._running]

    def _answer(self, pipe: Any) -> tuple[bool, Any]:
        try:
            if not pipe.poll(self.patience + 60):
                return True, "no answer: it hangs"
            return pickle.loads(pipe.recv_bytes())  # noqa: S301  # written by ourselves
        except (EOFError, ConnectionError):
            return True, "it died"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = tempfile.mkdtemp()
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self.count, meeting, self.patience), daemon=True
            )
            process.start()
            there.close()
            self._running.append((process, here))

    def close(self) -> None:
        """End all of them."""
        for process, pipe in self._running:
            pipe.close()
            process.terminate()
            process.join()
        self._running = []


def _serve(pipe: Any, rank: int, count: int, meeting: str, patience: float) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}  # for accelerate
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting}/meet", rank=rank, world_size=count, timeout=timedelta(seconds=patience)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())  # noqa: S301  # likewise
        except EOFError:
            return
        try:
            answer = False, function(*args)
        except BaseException:
            answer = True, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
