"""What TensorBoard shows of a run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import FakeMethod, Stop, stop_after, tiny

from resect.lab import session, trainer
from resect.lab.config.train import TrainConfig
from resect.lab.runs import open_run
from resect.lab.trainer import train


def curves(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_number_of_the_history_is_a_curve(tmp_path):
    assert TrainConfig().tensorboard, "by default"
    result = train(tiny(method=True, tensorboard=True), tmp_path, method_factory=FakeMethod)
    shown = curves(tmp_path)
    assert set(shown) == {"lr", "train_loss", "test_error", "muted", "seconds", "images_per_second"}
    for name, values in shown.items():
        assert values == [(row["epoch"], pytest.approx(row[name])) for row in result.history]
    open_run(tmp_path)


def test_a_resume_goes_on_with_the_curves_and_replaces_what_was_lost(tmp_path, monkeypatch):
    wanted = tiny(epochs=4, tensorboard=True)
    monkeypatch.setattr(session, "CHECKPOINT_SHARE", 0.0)  # the checkpoint of epoch 1 is the last but one
    with pytest.raises(Stop):
        train(wanted, tmp_path, progress=stop_after(3))
    result = train(wanted, tmp_path, resume=True)
    assert curves(tmp_path)["test_error"] == [(r["epoch"], pytest.approx(r["test_error"])) for r in result.history]


def test_without_tensorboard_it_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    said = []
    train(tiny(epochs=1, tensorboard=True, compile=False), tmp_path / "a", say=said.append)
    assert [line for line in said if "TensorBoard is not installed" in line] == said[:1]
    assert not (tmp_path / "a" / "tensorboard").exists()
    said.clear()
    train(tiny(epochs=1, tensorboard=False), tmp_path / "b", say=said.append)
    assert not any("TensorBoard" in line for line in said)
    assert not (tmp_path / "b" / "tensorboard").exists()
