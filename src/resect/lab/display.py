"""Progress on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


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
            self._bars[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._bars[name], completed=done, total=total)


@contextmanager
def progress_bar(console: Console) -> Iterator[Bars]:
    """Show progress bars for the length of a ``with`` statement."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)
