"""Where results come from: versions, machine, date, seeds and command, for the foot of a report."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import resect


def cpu_model() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def provenance(seeds: Sequence[int] = (), command: str | None = None, **more: Any) -> dict[str, Any]:
    """What a reader needs in order to repeat a run. ``more`` adds entries, ``command`` defaults to this one."""
    if command is None:
        command = " ".join([Path(sys.argv[0]).name, *map(shlex.quote, sys.argv[1:])])
    entries: dict[str, Any] = {
        "Resect": resect.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_model(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seeds": ", ".join(map(str, seeds)) or "none",
        "command": command,
    }
    return entries | {key.replace("_", " "): value for key, value in more.items()}
