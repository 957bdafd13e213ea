"""Progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

from resect.lab import progress as lab

SPEED_OVER = 120.0  # seconds, or 1000 steps: long enough for slow ones
LINE_EVERY = 30.0  # seconds between lines about the steps, where there is no terminal to show a bar


class Bars:
    """Stages as lines, and one bar per named piece of work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def stage(self, text: str) -> None:
        """Print what happens now; bars that are full go."""
        for name, bar in list(self._bars.items()):
            if self._progress.tasks[self._progress.task_ids.index(bar)].finished:
                self._progress.remove_task(bar)
                del self._bars[name]
        self._progress.console.print(f"[bold]{text}[/bold]")

    def steps(self, name: str, done: int, total: int) -> None:
        """Move the bar of a piece of work, making it first if it is new."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, note="")
        self._progress.update(self._bars[name], completed=done, total=total)

    def training(self, name: str, batch_size: int) -> lab.Tell:
        """Show a training: a bar with images/s, open blocks and the time left, and a line for every epoch."""
        console = self._progress.console
        every = 0.25 if console.is_terminal else LINE_EVERY
        shown = time.monotonic()

        def tell(now: lab.Progress) -> None:
            nonlocal shown
            if now.row is not None:
                console.print(epoch_line(now.row), soft_wrap=True, highlight=False)
                return
            self.steps(name, now.step, now.steps)
            if time.monotonic() - shown < every:
                return
            shown = time.monotonic()
            task = self._progress.tasks[self._progress.task_ids.index(self._bars[name])]
            note = ", ".join(filter(None, [_speed(task, batch_size), now.open_blocks()]))
            self._progress.update(task.id, note=note)
            if not console.is_terminal:
                left = f"{timedelta(seconds=task.time_remaining)} left" if task.time_remaining is not None else ""
                line = ", ".join(filter(None, [f"step {now.step} of {now.steps}", note, left]))
                console.print(line, soft_wrap=True, highlight=False)

        return tell


def epoch_line(row: dict[str, float]) -> str:
    """One line about an epoch's row of the history."""
    muted = f", {row['muted']:.0f} blocks muted" if "muted" in row else ""
    found = f"loss {row['train_loss']:.4f}, test error {row['test_error']:.2f} %{muted}"
    return f"epoch {row['epoch']:>3}: {found}, {row['images_per_second']:.0f} images/s"


def _speed(task: Task, batch_size: int) -> str:
    return f"{task.speed * batch_size:.0f} images/s" if task.speed else ""


@contextmanager
def progress_bar(console: Console) -> Iterator[Bars]:
    """Show progress bars for the length of a ``with`` statement."""
    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (name, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_OVER)
    if not console.is_interactive:  # where bars are not seen, all that would come of them is an empty line at the end
        yield Bars(progress)
        return
    with progress:
        yield Bars(progress)
