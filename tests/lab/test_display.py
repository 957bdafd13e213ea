"""What a training shows, on a terminal and in a log."""

import io
import re

import pytest
from rich.console import Console

from resect.lab import display
from resect.lab.methods import NoMethod
from resect.lab.progress import Progress

ROW = {"epoch": 3, "train_loss": 0.5, "test_error": 1.25, "muted": 7.0, "images_per_second": 690.4}


class Gated:
    blocks = range(54)
    open_blocks = 43


@pytest.fixture
def show(monkeypatch):
    """Show three steps, one a second, and an epoch; return what was written."""
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])

    def show(method, terminal, seconds=1.0):
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=terminal, width=30 if not terminal else 160, get_time=lambda: clock[0]
        )
        with display.progress_bar(console) as bars:
            tell = bars.training("net", batch_size=128)
            for step in range(1, 4):
                clock[0] += seconds
                tell(Progress(step, 120, method))
                bars._progress.refresh()
            tell(Progress(3, 120, method, ROW))
        return re.sub(r"\x1b\[[0-9;?]*\w", "", file.getvalue())

    return show


EPOCH = "epoch   3: loss 0.5000, test error 1.25 %, 7 blocks muted, 690 images/s"


def test_a_bar_shows_speed_open_blocks_and_the_time_left(show):
    shown = show(Gated(), terminal=True)
    assert "128 images/s, 43/54 blocks open" in shown
    assert "3/120" in shown
    assert "0:01:57" in shown
    assert EPOCH in shown


def test_a_plain_net_has_no_blocks_to_speak_of(show):
    shown = show(NoMethod(), terminal=True)
    assert "128 images/s" in shown
    assert "blocks open" not in shown


def test_a_log_has_whole_lines_now_and_then(show):
    lines = show(Gated(), terminal=False, seconds=20.0).split("\n")
    assert list(filter(None, lines)) == ["step 2 of 120, 6 images/s, 43/54 blocks open, 0:39:20 left", EPOCH]
    assert show(Gated(), terminal=False).strip() == EPOCH, "a fast epoch needs its own line alone"
