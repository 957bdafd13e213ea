"""Processes shared by all tests of this folder."""

from __future__ import annotations

import pytest
import torch
from processes import Processes

if not torch.distributed.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def two():
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def three():
    processes = Processes(3)
    yield processes
    processes.close()


@pytest.fixture(params=["two", "three"])
def several(request):
    """Two processes, then three."""
    return request.getfixturevalue(request.param)
