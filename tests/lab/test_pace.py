"""What is fastest is measured on a copy, said, kept, and not measured twice."""

import json
import math
from functools import partial
from inspect import signature

import pytest
import torch
from tiny_runs import FakeMethod, Stop, stop_after, tiny
from torch import nn

import resect
from resect.errors import InputError
from resect.lab import pace
from resect.lab.pace import Pace
from resect.lab.trainer import train
from resect.train.warmup import Warmable

IMAGES, LABELS = torch.randn(8, 1, 8, 8), torch.arange(8)


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10))


def choose(recipe, model=None, steps=1000):
    said = []
    return pace.choose(recipe, model or net(), IMAGES, LABELS, steps, said.append), said


@pytest.fixture
def speeds(monkeypatch):
    """Seconds per step by way, in place of the clock; the ways timed are noted."""
    times, timed = {}, []

    def one_step(net, optimizer, way, images, labels):
        timed.append(way)
        return times.get(way, 1.0)

    monkeypatch.setattr(pace, "_step", one_step)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    return times, timed


def test_the_fastest_is_taken_and_said(speeds):
    times, timed = speeds
    times.update({Pace(): 0.04, Pace("bf16"): 0.03, Pace("fp32", True): 0.02, Pace("bf16", True): 0.01})
    assert choose(tiny()) == (
        Pace("bf16", True), ["bf16 + channels_last: 800 images/s, against 200 images/s in plain fp32."]
    )  # fmt: skip
    assert timed == [Pace(), Pace("fp32", True), Pace("bf16"), Pace("bf16", True)] * 4, "in turns"


def test_without_a_clear_gain_the_simpler_one_is_taken(speeds):
    times, _ = speeds
    times.update({Pace(): 0.0100, Pace("fp32", True): 0.0092, Pace("bf16"): math.inf, Pace("bf16", True): 0.0099})
    chosen, (said,) = choose(tiny())
    assert chosen == Pace()
    assert said.startswith("plain fp32: 800 images/s, and nothing is clearly faster (fp32 + channels_last 870 images/s")
    assert "bf16 fails" in said


def test_what_the_recipe_says_is_not_measured(speeds):
    times, timed = speeds
    fixed = {"precision": "bf16", "channels_last": True, "compile": False}
    assert choose(tiny(**fixed)) == (Pace("bf16", True), [])
    assert choose(tiny(**fixed | {"compile": True})) == (Pace("bf16", True, True), [])
    assert choose(tiny(), steps=499)[0] == Pace()
    assert not timed
    times[Pace("bf16", True)] = 0.5
    assert choose(tiny(channels_last=True, compile=True))[0] == Pace("bf16", True, True)
    assert set(timed) == {Pace("fp32", True), Pace("bf16", True)}


def test_compiling_is_weighed_against_the_training(speeds):
    times, timed = speeds
    compiled = Pace(compile=True)
    times.update({Pace(): 1.0, compiled: 0.8})
    fixed = {"precision": "fp32", "channels_last": False}
    assert choose(tiny(**fixed), steps=1799)[0] == Pace()
    assert compiled not in timed
    assert choose(tiny(**fixed), steps=1801)[0] == compiled
    assert choose(tiny(method=True, **fixed), steps=1801)[0] == Pace(), "never with a method"
    times[compiled] = 0.95
    assert choose(tiny(**fixed), steps=1801)[0] == Pace()


def test_the_time_to_compile_counts(monkeypatch):
    passes = iter([100.0, 1.0, 0.5, 0.7])
    monkeypatch.setattr(pace, "_step", lambda *_: next(passes))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert pace.measure_compiled(net(), tiny().train, Pace(compile=True), IMAGES, LABELS, 1000) == pytest.approx(
        0.5 + 0.1
    )


def test_measuring_leaves_the_model_and_the_random_numbers_alone():
    model = net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    times = pace.measure(net(), tiny().train, [Pace(), Pace("bf16", True)], IMAGES, LABELS)
    assert all(0 < seconds < math.inf for seconds in times.values())
    torch.set_rng_state(state)
    chosen, said = choose(tiny(compile=False), model)
    assert said
    assert isinstance(chosen, Pace)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_way_that_fails_is_out():
    class NoBf16(nn.Linear):
        def forward(self, x):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no such kernel")
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), NoBf16(64, 10))
    times = pace.measure(model, tiny().train, [Pace(), Pace("bf16")], IMAGES, LABELS)
    assert times[Pace("bf16")] == math.inf > times[Pace()]


def test_a_model_that_cannot_be_copied_is_trained_plainly():
    model = net()
    model.extra = model[0].weight * 2  # no leaf
    chosen, (said,) = choose(tiny(), model)
    assert chosen == Pace()
    assert "cannot be measured here" in said


def test_a_resume_keeps_the_choice_and_does_not_measure(tmp_path, monkeypatch):
    chosen = Pace("bf16", True)
    monkeypatch.setattr(pace, "choose", lambda *_: chosen)
    whole = train(tiny(), tmp_path / "whole")
    with pytest.raises(Stop):
        train(tiny(), tmp_path / "run", progress=stop_after(1))
    monkeypatch.setattr(pace, "choose", None)
    resumed = train(tiny(), tmp_path / "run", resume=True)
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.model.layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["precision"], metrics["channels_last"], metrics["compile"]) == ("bf16", True, False)


@pytest.mark.skipif("isolate_recompiles" not in signature(torch.compile).parameters, reason="an older torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks, and hides it
def test_with_a_method_the_net_is_compiled_block_by_block_before_the_first_step(tmp_path, monkeypatch):
    plain = train(tiny(method=True, compile=False), tmp_path / "plain")
    graphs, warmup = [], Warmable.warmup
    monkeypatch.setattr(resect, "compile", partial(resect.compile, backend="eager"))
    monkeypatch.setattr(Warmable, "warmup", lambda *given: graphs.append(warmup(*given)))
    run = train(tiny(method=True, compile=True), tmp_path / "run")
    assert graphs[0] >= 2 * len(run.method.blocks), "in train and in eval mode"
    one, other = plain.model.state_dict(), run.model.state_dict()
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_a_method_of_ones_own_is_not_compiled(tmp_path):
    with pytest.raises(InputError, match="compile = true does not go with a FakeMethod"):
        train(tiny(method=True, compile=True), tmp_path / "run", method_factory=FakeMethod)
