"""A recovery that is stopped goes on to the bit, with `recover` and with ``resect shrink --resume``."""

from __future__ import annotations

import signal

import pytest
import torch
from tiny_runs import Stop, tiny
from torch import nn

import resect
from resect.errors import FileError, InputError
from resect.lab.data import in_batches
from resect.lab.interrupt import Interrupted
from resect.lab.open import Opened, open_model
from resect.lab.shrink import unfinished
from resect.lab.shrink.places import unfinished_folder
from resect.lab.shrink.recovering import recover
from resect.lab.shrink.unfinished import Unfinished
from resect.lab.shrink.wishes import Wishes
from resect.lab.trainer import train

WISHES = Wishes(names=("layer2.0",), recover=2)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfinished") / "full"
    train(tiny(epochs=1), folder)
    return folder


def with_dropout(folder):
    """A net that draws random numbers of its own while it trains."""
    found = open_model(str(folder))
    found.model.fc = nn.Sequential(nn.Dropout(0.2), found.model.fc)
    found.model.eval()
    return found


@pytest.fixture
def opened(full):
    return with_dropout(full)


def cut(opened):
    blocks = resect.find_blocks(opened.model, opened.example())
    return resect.remove(opened.model, blocks, blocks.names[1:2])


def begun(folder, opened, wishes=WISHES):
    """What is kept beside ``folder``, in its first round."""
    kept = Unfinished.of(folder, opened, wishes)
    kept.plan(0, lambda: cut(opened).resect_plan)
    return kept


def at(step, what):
    """Progress that does something when a step is done."""

    def progress(done, total):
        if done == step:
            what()

    return progress


def fail():
    raise Stop


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def healed(full):
    """The net that was never stopped, its loss, and the number of steps."""
    opened, count = with_dropout(full), []
    net = cut(opened)
    loss = recover(net, opened, 2, progress=lambda done, total: count.append(total))
    return net, loss, count[-1]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.77])
def test_a_recovery_stopped_after_any_step_goes_on_to_the_bit(opened, healed, tmp_path, share):
    whole, loss, steps = healed
    step = max(1, round(share * steps))
    stop = at(step, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match=f"after step {step} of {steps}"):
        recover(cut(opened), opened, 2, kept=begun(tmp_path / "cut", opened), progress=stop)
    left, net = [], cut(opened)
    found = recover(
        net, opened, 2, kept=begun(tmp_path / "cut", opened), progress=lambda done, total: left.append(done)
    )
    assert left == list(range(step + 1, steps + 1))
    assert same(net, whole)
    assert found == loss


def test_one_that_is_killed_goes_on_from_the_last_checkpoint(opened, healed, tmp_path, monkeypatch):
    whole, _, steps = healed
    monkeypatch.setattr(unfinished, "_SECONDS", 0.0)
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: 0.0)  # so that a checkpoint is due at every step
    with pytest.raises(Stop):
        recover(cut(opened), opened, 2, kept=begun(tmp_path / "cut", opened), progress=at(5, fail))
    left, net = [], cut(opened)
    recover(net, opened, 2, kept=begun(tmp_path / "cut", opened), progress=lambda done, total: left.append(done))
    assert left == list(range(5, steps + 1))
    assert same(net, whole)


def test_checkpoints_are_a_minute_apart(opened, tmp_path, monkeypatch):
    now, written, total = [0.0], [], []
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(unfinished.checkpoint, "save", lambda folder, number, content: written.append(content["state"]))

    def tick(done, steps):
        now[0] += 25.0
        total.append(steps)

    recover(cut(opened), opened, 1, kept=begun(tmp_path / "cut", opened), progress=tick)
    assert written[0] is None  # the plan, before any training
    assert [state["step"] for state in written[1:]] == sorted({*range(3, total[0], 3), total[0]})
    assert not Unfinished().due


def test_a_mimicking_that_is_over_is_not_made_again(opened, tmp_path):
    wishes = Wishes(names=("layer2.0",), recover=2, recover_by="mimic")
    one, other = cut(opened), cut(opened)
    loss = recover(one, opened, 2, by="mimic", limit=100, kept=begun(tmp_path / "cut", opened, wishes))
    again = recover(
        other, opened, 2, by="mimic", limit=100, kept=begun(tmp_path / "cut", opened, wishes),
        progress=lambda done, total: fail(),
    )  # fmt: skip
    assert same(one, other)
    assert again == loss


def test_what_was_asked_otherwise_or_is_damaged_is_told(opened, tmp_path):
    begun(tmp_path / "cut", opened)
    others = Wishes(names=("layer3.0",), recover=3)
    with pytest.raises(InputError) as told:
        Unfinished.of(tmp_path / "cut", opened, others)
    assert "names was ['layer2.0'], and is ['layer3.0']" in str(told.value)
    assert "recover was 2, and is 3" in str(told.value)
    with torch.no_grad():
        opened.model.fc[1].bias += 1
    with pytest.raises(InputError, match="weights was"):
        Unfinished.of(tmp_path / "cut", opened, WISHES)
    other = open_model(str(opened.folder), data="digits", data_options=["fold=1"])
    with pytest.raises(InputError, match="samples was"):
        Unfinished.of(tmp_path / "cut", other, WISHES)
    state = next(unfinished_folder(tmp_path / "cut").glob("*/state.json"))
    state.write_text(state.read_text()[:-20])
    with pytest.raises(FileError, match="damaged"):
        Unfinished.of(tmp_path / "cut", opened, WISHES)


def test_a_last_batch_of_one_sample_is_left_out(opened, monkeypatch):
    images, labels = opened.images("train", 129)
    monkeypatch.setattr(Opened, "batches", lambda *_: in_batches(images, labels, 64))
    totals = []
    recover(cut(opened), opened, 3, progress=lambda done, total: totals.append(total))
    assert totals == [6] * 6


def test_files_of_others_stay(opened, tmp_path):
    kept = begun(tmp_path / "cut", opened)
    for name in ("notes", "checkpoint-000001-keep"):
        (kept.folder / name).mkdir()
    assert len(begun(tmp_path / "cut", opened).plans) == 1
    kept.done()
    assert {path.name for path in kept.folder.iterdir()} == {"notes", "checkpoint-000001-keep"}


def test_one_that_diverges_keeps_what_was_finite(opened, tmp_path):
    net, kept = cut(opened), begun(tmp_path / "cut", opened)
    with pytest.raises(resect.ResectError, match="Recovering diverged by step"):
        recover(net, opened, 2, kept=kept, progress=ruined_before(4, net))
    assert Unfinished.of(tmp_path / "cut", opened, WISHES).state is None


def ruined_before(step, net):
    """Weights become infinite after the step before, and someone stops the training after the step."""

    def progress(done, total):
        if done == step - 1:
            with torch.no_grad():
                net.fc[1].weight.fill_(torch.inf)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return progress
