"""Let a training on the CPU keep the memory of one step for the next, where the C library would give it back."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt, in glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep what is freed, for this process and for good; return whether its C library does so (glibc's does).

    glibc maps every large tensor anew and unmaps it when it is freed, so that in each step the system has to find and
    clear the pages of all activations: a tenth of a step. Afterwards the process stays as large as it ever was.

    For processes that are a training's own; milliseconds of inference measured in one would not be what others get.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another system, or musl
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, _LARGEST), mallopt(_TOP_PAD, 64 * 2**20)])
