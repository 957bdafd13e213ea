"""A training that is stopped, killed or diverges at any step: what is left, and what comes of going on."""

import json
import math
import os
import signal
import threading
from itertools import cycle, product

import pytest
import torch
from tiny_runs import TINY, Stop, tiny
from torch import nn

from resect.errors import ResectError
from resect.lab import checkpoint, recipe, session, steps
from resect.lab.interrupt import Interrupted, stop_signals
from resect.lab.trainer import train
from resect.lab.tree import flatten

STEPS = 10  # two epochs of five

# Every training method, at work within ten steps. A new one: add its table.
METHODS = {
    "plain": None,
    "epsilon-gate": {"epsilon": 3.8, "side": 0.1, "skip_muted_after": 2, "recheck_every": 3, "settle_after": 8},
    "stochastic-depth": {"drop_prob": 0.6, "ramp_steps": 4},
    "residual-droppath": {"drop_prob": 0.6, "drop_steps": 2, "mask": "fresh", "scaling": "paper"},
    "effective-paths": {"keep": 2},
    "random-subset": {"keep": 2},
}
TRAININGS = {
    "shift, flip": {"shift": 1, "flip": True},
    "adamw, accumulate, clip": {"optimizer": "adamw", "lr": 0.01, "accumulate": 3, "clip": 0.5},
    "bf16, channels_last, warm-up": {
        "precision": "bf16", "channels_last": True, "schedule": "step", "warmup": 1.3, "nesterov": True
    },
}  # fmt: skip

ADAPTIVE = {"adaptive": {"schedule": "adaptive"}}

# Three blocks are few for a method, and ε is chosen so that some are muted soon.
pytestmark = pytest.mark.filterwarnings("ignore:.*start just below", "ignore:.*below 6")


@pytest.fixture(autouse=True)
def every_checkpoint_is_affordable(monkeypatch):
    monkeypatch.setattr(session, "CHECKPOINT_SHARE", 1e9)


def state_of(folder):
    """Everything the last checkpoint holds, apart from the clock, as exact JSON and lists of numbers."""
    state = checkpoint.load(checkpoint.newest(folder))
    del state["seconds"]
    clock = ("seconds", "images_per_second")
    state["history"] = [{key: value for key, value in row.items() if key not in clock} for row in state["history"]]
    tensors = {}
    plain = json.dumps(flatten(state, tensors, ""))
    return plain, {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}


def stop_at(step, number=signal.SIGINT):
    def progress(now):
        if now.step == step and now.row is None:
            signal.raise_signal(number)

    return progress


def with_method(method, **train):
    tables = {**TINY, "train": {**TINY["train"], "epochs": 2, "lr": 0.05, **train}}
    return recipe.parse(tables if METHODS[method] is None else {**tables, "method": {"name": method} | METHODS[method]})


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *product(["plain"], TRAININGS),
        *zip(list(METHODS)[1:], cycle(TRAININGS), strict=False),
        ("epsilon-gate", "adaptive"),
    ],
)
def test_interrupted_at_any_step_the_outcome_is_the_same_bit_for_bit(tmp_path, method, kind):
    wanted = with_method(method, **(TRAININGS | ADAPTIVE)[kind])
    train(wanted, tmp_path / "whole")
    whole = state_of(tmp_path / "whole")
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        torch.manual_seed(step)  # the caller's stream must not matter
        with pytest.raises(Interrupted, match=f"after step {step} of {STEPS}; the checkpoint is written"):
            train(wanted, folder, interruptible=True, progress=stop_at(step, (signal.SIGINT, signal.SIGTERM)[step % 2]))
        assert checkpoint.newest(folder).name == f"checkpoint-{step:06d}"
        train(wanted, folder, resume=True)
        assert state_of(folder) == whole, f"interrupted at step {step}"


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_at_every_step_in_turn(tmp_path, method):
    wanted = with_method(method, shift=1)
    train(wanted, tmp_path / "whole")
    for step in range(1, STEPS):
        with pytest.raises(Interrupted):
            train(wanted, tmp_path / "parts", resume=True, interruptible=True, progress=stop_at(step))
    train(wanted, tmp_path / "parts", resume=True, interruptible=True, progress=stop_at(STEPS))  # over: nothing to stop
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


def test_dropout_goes_on_in_the_middle_of_an_epoch(tmp_path):
    def net():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    whole = train(tiny(), tmp_path / "a", model=net())
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path / "b", model=net(), interruptible=True, progress=stop_at(7))
    resumed = train(tiny(), tmp_path / "b", model=net(), resume=True)
    assert torch.equal(whole.model[1].weight, resumed.model[1].weight)


def test_a_killed_training_goes_on_from_a_checkpoint_within_the_epoch(tmp_path):
    def kill(now):
        if now.step == 8:
            raise Stop

    wanted = with_method("epsilon-gate", checkpoint_minutes=0.0)
    train(wanted, tmp_path / "whole")
    with pytest.raises(Stop):
        train(wanted, tmp_path / "killed", progress=kill)
    assert checkpoint.newest(tmp_path / "killed").name == "checkpoint-000007"
    train(wanted, tmp_path / "killed", resume=True)
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")


def test_checkpoints_within_an_epoch_wait_for_their_time_and_their_share(tmp_path, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(args[1]) or save(*args))
    train(tiny(epochs=2), tmp_path / "time")
    assert saved == [5, 10]
    saved.clear()
    monkeypatch.setattr(session, "CHECKPOINT_SHARE", 0.0)
    train(tiny(epochs=2, checkpoint_minutes=0.0), tmp_path / "share")
    assert saved == [1, 10], "the first costs nothing yet, the last is always written"


def poisoned(monkeypatch, spoil, at):
    """Let ``spoil(session)`` act right after optimizer step ``at``, and give its result as the loss if it has one."""
    real = steps.train_step

    def train_step(session, indices):
        loss = real(session, indices)
        if session.step + 1 == at:
            spoilt = spoil(session)
            return loss if spoilt is None else torch.full_like(loss, spoilt)
        return loss

    monkeypatch.setattr("resect.lab.trainer.train_step", train_step)


def test_a_nan_names_its_step_and_the_checkpoint_before_it_stays(tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda session: math.nan, at=8)
    with pytest.raises(ResectError, match=r"loss nan in epoch 2, step 3 of 5.*checkpoint-000007"):
        train(tiny(checkpoint_minutes=0.0), tmp_path / "often")
    with pytest.raises(ResectError, match=r"loss nan in epoch 2, step 3 of 5.*checkpoint-000005"):
        train(tiny(), tmp_path / "seldom")


@pytest.mark.parametrize("ask", ["time", "signal"])
def test_weights_that_are_not_finite_are_never_written(tmp_path, monkeypatch, ask):
    def spoil(session):
        next(session.model.parameters()).data.view(-1)[0] = math.inf

    poisoned(monkeypatch, spoil, at=3)
    minutes = 0.0 if ask == "time" else 60.0
    with pytest.raises(ResectError, match=r"a weight that is not finite in epoch 1, step 3 of 5"):
        train(tiny(checkpoint_minutes=minutes), tmp_path, interruptible=True, progress=stop_at(3) if minutes else None)
    last = checkpoint.newest(tmp_path)
    assert (last.name == "checkpoint-000002") if ask == "time" else last is None


def test_a_training_that_never_took_a_step_leaves_no_folder(tmp_path):
    with pytest.raises(ResectError, match="logits"):
        train(tiny(tensorboard=True), tmp_path / "runs" / "a", model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(ResectError, match="logits"):
        train(tiny(), tmp_path / "mine", model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    assert (tmp_path / "mine").is_dir(), "it was there before"


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores this signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_signals_are_taken_once_and_given_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_signals(True) as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with stop_signals(False) as stopped:
        assert signal.getsignal(signal.SIGINT) is before
        assert not stopped()


def test_a_training_in_another_thread_leaves_signals_alone(tmp_path):
    failures = []

    def run():
        try:
            train(tiny(epochs=1), tmp_path)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


def test_a_run_says_itself_what_it_was(tmp_path):
    from resect.errors import FileError, InputError
    from resect.lab.runs import wanted

    used = with_method("plain")
    with pytest.raises(Interrupted):
        train(used, tmp_path / "run", interruptible=True, progress=stop_at(3))
    assert wanted(str(tmp_path / "run"), [], None, True) == (tmp_path / "run", used)
    with pytest.raises(InputError, match=r"goes on as it was: leave out train\.epochs=9"):
        wanted(str(tmp_path / "run"), ["train.epochs=9"], None, True)
    with pytest.raises(FileError, match="There is nothing to go on with in"):
        wanted("digits-plain", [], tmp_path / "typo", True)
