"""Ctrl-C and SIGTERM while a net trains: the step under way is finished first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from resect.errors import ResectError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(ResectError):
    """A training was asked to stop, and did after a checkpoint; ``resume=True`` goes on from there."""


@contextmanager
def stop_signals(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether one of the signals has come; the second one acts as it always does.

    Without ``wanted`` signals are left alone. Python allows it on the main thread alone.
    """
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        give_back()

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in SIGNALS if wanted}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        give_back()
