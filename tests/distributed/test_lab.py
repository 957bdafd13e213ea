"""The reference trainer on two processes: launched by accelerate, and resumed on another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate")
pytest.importorskip("pydantic")

TINY = {
    "model": {"name": "cifar-preresnet-20", "options": {"widths": [4, 4, 8]}},
    "data": {"name": "digits", "options": {"folds": 4}},
    "train": {"epochs": 3, "batch_size": 256, "shift": 1, "tensorboard": False, "precision": "fp32"},
}
METHODS = {
    "stochastic-depth": {"name": "stochastic-depth", "per": "sample", "rule": "uniform"},
    "residual-droppath": {"name": "residual-droppath", "rule": "uniform", "recalibrate": 2},
    "epsilon-gate": {"name": "epsilon-gate", "epsilon": 0.4, "side": 0.1, "skip_muted_after": 2, "start_step": 3},
}


class Stop(Exception):
    pass


def part(method, folder, epochs=None):
    """Train, or go on, until so many epochs are done; return the history without times, and the weights."""
    from resect.lab import recipe
    from resect.lab.trainer import train

    def progress(now):
        if now.row is not None and now.row["epoch"] == epochs:
            raise Stop

    if dist.is_initialized():
        dist.destroy_process_group = lambda *_: None  # accelerate ends it with the training: there are more to come
    try:
        result = train(recipe.parse(TINY | {"method": METHODS[method]}), folder, resume=True, progress=progress)
    except Stop:
        return None
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in result.history]
    return rows, result.method.steps, dict(result.model.state_dict())


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(value, other[2][name]) for name, value in one[2].items())


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_two_processes_end_with_the_same_bits(method, two, tmp_path):
    whole = two(part, method, str(tmp_path / "whole"))[0]
    assert two(part, method, str(tmp_path / "parts"), 2) == [None, None]
    first, second = two(part, method, str(tmp_path / "parts"))
    assert same(first, whole)
    weights = [{k: v for k, v in found[2].items() if "running" not in k} for found in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_another_number_of_processes(method, two, tmp_path):
    two(part, method, str(tmp_path / "fewer"), 1)
    fewer = part(method, str(tmp_path / "fewer"))
    assert part(method, str(tmp_path / "more"), 1) is None
    more = two(part, method, str(tmp_path / "more"))
    for rows, steps, weights in (fewer, *more):
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        assert steps == 3 * 5
        assert all(value.isfinite().all() for value in weights.values())


def test_launched_by_accelerate_one_process_speaks_and_writes(tmp_path):
    (tmp_path / "tiny.toml").write_text(
        "[model]\nname = 'cifar-preresnet-20'\noptions = { widths = [4, 4, 8] }\n[data]\nname = 'digits'\n"
        "[train]\nepochs = 2\nbatch_size = 256\nprecision = 'fp32'\n[method]\nname = 'stochastic-depth'\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    ran = subprocess.run(
        [*launch, "-m", "resect", "train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("The run is in") == 1
    assert ran.stderr.count("epoch   2: loss") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["epoch"] == 2
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 3
