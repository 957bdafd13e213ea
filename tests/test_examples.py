"""Each example runs as it is, closes blocks, learns, and is the ordinary script but for six lines."""

from __future__ import annotations

import difflib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from resect.train.method import Method

ROOT = Path(__file__).parent.parent / "examples"
ENGINES = ["plain", "timm", "accelerate", "transformers", "lightning"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script; return its losses, how often modules trained and optimizers stepped, and its names."""
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        reset()
        calls = {"modules": 0, "steps": 0}

        def count(what, counted=True):
            calls[what] += counted

        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        hooks = [
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, *_: count("modules", module.training and torch.is_grad_enabled())
            ),
            register_optimizer_step_post_hook(lambda *_: count("steps")),
        ]
        capsys.readouterr()
        try:
            names = runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            for hook in hooks:
                hook.remove()
        losses = re.findall(r"\bloss'?:? '?(\d+\.\d+)", capsys.readouterr().out)
        return [float(loss) for loss in losses], calls, names

    yield run
    reset()


def reset():
    """Forget what accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("engine", ENGINES)
def test_with_resect_it_is_the_same_script_but_for_six_lines(engine):
    ordinary, ours = ((ROOT / engine / f"{name}.py").read_text().splitlines() for name in ("ordinary", "with_resect"))
    changes = list(difflib.ndiff(ordinary, ours))
    assert 3 <= sum(line.startswith("+ ") for line in changes) <= 6
    assert sum(line.startswith("- ") for line in changes) <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_both_scripts_learn_and_one_closes_blocks(engine, run, monkeypatch):
    losses, calls, _ = run(f"{engine}/ordinary.py")
    assert losses[-1] < losses[0] - 0.1
    open_blocks, begin = [], Method.begin_step
    monkeypatch.setattr(Method, "begin_step", lambda self: begin(self) or open_blocks.append(self.open_blocks))
    mine, counted, names = run(f"{engine}/with_resect.py")
    assert mine[-1] < mine[0] - 0.1
    assert len(mine) == len(losses)
    method = names["method"]
    assert method.steps == counted["steps"] == calls["steps"] == len(open_blocks)
    assert min(open_blocks) < len(method.blocks) <= 8
    assert counted["modules"] < 0.98 * calls["modules"], "closed blocks were not computed"
    assert not any("resect" in name for name in method.model.state_dict())


@pytest.mark.parametrize(("engine", "checkpoint"), [("timm", "checkpoint-0.pth.tar"), ("accelerate", "checkpoint-0")])
def test_a_checkpoint_of_the_engine_is_gone_on_with(engine, checkpoint, run):
    script = f"{engine}/with_resect.py"
    _, calls, first = run(script, "--epochs", "1")
    steps = first["method"].steps
    first["method"].detach()
    losses, counted, names = run(script, "--epochs", "2", "--resume", checkpoint)
    assert len(losses) == 1
    assert names["method"].steps == 2 * steps == calls["steps"] + counted["steps"]


def test_every_example_is_listed():
    text = (ROOT / "README.md").read_text()
    for folder in ENGINES:
        assert f"({folder})" in text
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"} == set(ENGINES)
