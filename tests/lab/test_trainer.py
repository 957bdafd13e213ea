import csv
import json
import math
import shutil

import pytest
import torch
from tiny_runs import TINY, FakeMethod, Stop, stop_after, tiny
from torch import nn

from resect.errors import FileError, InputError, ResectError
from resect.lab import checkpoint, recipe, runs, session
from resect.lab.data import load, mean_std, normalize
from resect.lab.evaluate import evaluate
from resect.lab.runs import open_run
from resect.lab.trainer import train
from resect.lab.tree import flatten

CLOCK = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(session, "CHECKPOINT_SHARE", math.inf)


def without_clock(history):
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in history]


def state_of(folder):
    """Everything the last checkpoint holds, apart from the clock, as exact JSON."""
    state = checkpoint.load(checkpoint.newest(folder))
    state["history"] = without_clock(state["history"])
    assert not state.pop("seconds"), "an epoch's end keeps nothing of it"
    tensors = {}
    plain = flatten(state, tensors, "")
    return json.dumps(plain), {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [False, True])
def test_resume_after_any_epoch_is_bit_identical(tmp_path, method, optimizer):
    recipe = tiny(method, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.01)
    whole = train(recipe, tmp_path / "whole", method_factory=FakeMethod)
    parts = tmp_path / "parts"
    for epoch in (1, 2):
        torch.manual_seed(epoch)  # the caller's stream must not matter
        with pytest.raises(Stop):
            train(recipe, parts, method_factory=FakeMethod, resume=True, progress=stop_after(epoch))
        with pytest.raises(FileError, match="did not finish: resume"):
            open_run(parts)
    resumed = train(recipe, parts, method_factory=FakeMethod, resume=True)
    assert without_clock(resumed.history) == without_clock(whole.history)
    assert state_of(parts) == state_of(tmp_path / "whole")
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3]
    assert all(("muted" in row) == method for row in resumed.history)


def test_a_run_learns_is_repeatable_and_reopens(tmp_path):
    before = torch.get_rng_state()
    calls = []
    recipe = tiny(epochs=6, batch_size=64)
    result = train(recipe, tmp_path / "a", progress=calls.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.history[-1]["test_error"] < 40  # chance is 90
    assert result.method is None
    assert not result.model.training
    steps = 6 * (1347 // 64)
    assert [(now.step, now.steps) for now in calls if not now.row] == [(step + 1, steps) for step in range(steps)]
    assert [now.row for now in calls if now.row] == result.history

    model, again, data = open_run(tmp_path / "a")
    assert again == recipe
    assert not model.training
    error = evaluate(model, *data.sample("test"))
    assert error == result.history[-1]["test_error"]
    rows = list(csv.DictReader((tmp_path / "a" / "history.csv").read_text().splitlines()))
    assert [float(row["test_error"]) for row in rows] == [row["test_error"] for row in result.history]
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["test_error"] == error


def test_two_steps_are_sgd_written_out(tmp_path):
    recipe = tiny(epochs=2, batch_size=1347, schedule="cosine", momentum=0.0, shift=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weight, bias = (p.detach().clone().requires_grad_() for p in net.parameters())
    data = load("digits", folds=4)
    x = normalize(data.train.images, *mean_std(data.train)).flatten(1)
    losses = []
    for rate in (0.1, 0.05):
        loss = nn.functional.cross_entropy(x @ weight.t() + bias, data.train.labels)
        weight_grad, bias_grad = torch.autograd.grad(loss, (weight, bias))
        weight = (weight - rate * (weight_grad + 1e-3 * weight)).detach().requires_grad_()
        bias = (bias - rate * bias_grad).detach().requires_grad_()
        losses.append(loss.item())
    result = train(recipe, tmp_path, model=net)
    torch.testing.assert_close(net[1].weight, weight)
    torch.testing.assert_close(net[1].bias, bias)
    assert [row["train_loss"] for row in result.history] == pytest.approx(losses, rel=1e-5)
    assert [row["lr"] for row in result.history] == pytest.approx([0.1, 0.05])


def test_the_method_is_stepped_heard_and_detached(tmp_path):
    made = []

    def factory(*arguments):
        assert arguments[3].shape == (256, 1, 8, 8), "one training batch"
        made.append(FakeMethod(*arguments))
        return made[-1]

    plain = train(tiny(), tmp_path / "plain")
    result = train(tiny(method=True), tmp_path / "method", method_factory=factory)
    assert result.method is made[0]
    assert made[0].steps == 3 * (1347 // 256)
    assert not any(module._forward_hooks for module in result.model.modules())
    assert result.history[0]["train_loss"] != plain.history[0]["train_loss"]
    with pytest.raises(Stop):
        train(tiny(method=True), tmp_path / "stopped", method_factory=factory, progress=stop_after(1))
    assert not any(conv._forward_hooks for conv in made[1].convs)


def test_a_diverging_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poison(FakeMethod):
        def extra_loss(self, target=None):
            return float("nan") if self.steps == 8 else 0.0  # 5 steps an epoch: the third of epoch 2

    with pytest.raises(ResectError, match=r"loss nan in epoch 2, step 3 of 5.*checkpoint-000005"):
        train(tiny(method=True), tmp_path, method_factory=Poison)
    saved = checkpoint.load(checkpoint.newest(tmp_path))
    assert len(saved["history"]) == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_weights_that_diverge_in_the_last_step_are_not_kept(tmp_path):
    with pytest.raises(ResectError, match=r"a weight that is not finite in epoch 1, step 1 of 1.*no checkpoint"):
        train(tiny(lr=1e38, batch_size=1347, weight_decay=1e30, schedule="constant"), tmp_path)
    assert checkpoint.newest(tmp_path) is None


def test_folders_that_hold_something_else(tmp_path):
    train(tiny(epochs=1), tmp_path / "run")
    with pytest.raises(InputError, match="holds a run already"):
        train(tiny(epochs=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"train\.epochs: 1, now 2"):
        train(tiny(epochs=2), tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot make the run folder"):
        train(tiny(), tmp_path / "file")


def drawn(seed=None, epochs=1):
    method = {"name": "random-subset", "keep": 1} | ({} if seed is None else {"seed": seed})
    return recipe.parse({**TINY, "train": {**TINY["train"], "epochs": epochs, "seed": 7}, "method": method})


def test_a_method_draws_by_the_trainings_seed_or_its_own(tmp_path):
    assert train(drawn(), tmp_path / "training").method.seed == 7
    assert train(drawn(seed=2), tmp_path / "own").method.seed == 2


def test_a_run_begun_before_methods_had_a_seed_goes_on_as_it_was(tmp_path):
    whole = train(drawn(seed=0, epochs=2), tmp_path / "whole")
    with pytest.raises(Stop):
        train(drawn(seed=0, epochs=2), tmp_path / "old", progress=stop_after(1))
    last = checkpoint.newest(tmp_path / "old")
    state = checkpoint.load(last)
    del state["recipe"]["method"]["seed"]
    checkpoint.save(tmp_path / "old", state["step"], state)
    with pytest.raises(InputError, match=r"another recipe, which cannot be resumed: method\.seed: 0, now 7"):
        train(drawn(epochs=2), tmp_path / "old", resume=True)
    resumed = train(runs.recipe_of(tmp_path / "old"), tmp_path / "old", resume=True)
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_without_its_checkpoint_is_never_overwritten(tmp_path, resume):
    train(tiny(epochs=1), tmp_path)
    shutil.rmtree(checkpoint.newest(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"holds 'model\.safetensors', .* and no checkpoint to go on from"):
        train(tiny(epochs=1, lr=0.3), tmp_path, resume=resume)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", b"cut", "damaged"),
        ("recipe.json", b"{", "not whole JSON"),
        ("recipe.json", b'{"modle": {}}', "'model'"),
        ("metrics.json", b"{}", "not written by this version"),
        ("metrics.json", None, "not the folder of a finished run"),
    ],
)
def test_a_damaged_run_folder_is_one_clear_message(tmp_path, file, content, said):
    train(tiny(epochs=1), tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(FileError, match=said):
        open_run(tmp_path)


def test_a_model_that_is_not_the_recipes_says_so(tmp_path):
    given = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    given[0].eval()
    assert train(tiny(epochs=1), tmp_path, model=given).model is given
    assert [module.training for module in given.modules()] == [True, False, True]
    with pytest.raises(FileError, match="given a model of its own"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), r"images of shape \(1, 8, 8\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), r"gives \(4,\) per image, not 10 logits"),
        (nn.Conv2d(1, 1, 3), "not 10 logits"),
    ],
)
def test_a_model_that_does_not_fit_the_data(tmp_path, model, said):
    with pytest.raises(InputError, match=said):
        train(tiny(), tmp_path, model=model)


def test_checkpoints_that_cost_too_much_wait_but_the_last_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "CHECKPOINT_SHARE", 0.0)
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, number, state: saved.append(number) or save(folder, number, state)
    )
    train(tiny(), tmp_path)
    assert saved == [5, 15]


def test_evaluate_leaves_every_mode_and_buffer():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[1].eval()
    images, labels = torch.randn(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    error = evaluate(net, images, labels, batch_size=3)
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert error == pytest.approx(100 * (net.eval()(images).argmax(1) != 0).float().mean().item())
    assert evaluate(net, images, 1 - labels) == pytest.approx(100 - error)


@pytest.mark.filterwarnings("ignore:.*below 6")
def test_a_net_trained_with_test_time_scaling_is_saved_with_it(tmp_path):

    method = {"name": "stochastic-depth", "scaling": "paper", "rule": "uniform"}
    wanted = recipe.parse({**TINY, "method": method})
    result = train(wanted, tmp_path / "run")
    model, _, data = open_run(tmp_path / "run")
    error = evaluate(model, normalize(data.test.images, *mean_std(data.train)), data.test.labels)
    assert error == pytest.approx(result.history[-1]["test_error"], abs=0.3)
    unscaled = checkpoint.load(checkpoint.newest(tmp_path / "run"))["model"]["layer2.0.conv2.weight"]
    assert torch.allclose(model.layer2[0].conv2.weight, 0.5 * unscaled)


@pytest.mark.filterwarnings("ignore:.*below 6")
def test_batch_statistics_are_renewed_at_the_end_if_asked(tmp_path):
    import itertools

    import resect

    method = {"name": "stochastic-depth", "drop_prob": 0.9, "rule": "uniform", "scaling": "none", "recalibrate": 4}
    result = train(recipe.parse({**TINY, "method": method}), tmp_path / "run")
    plain = train(recipe.parse({**TINY, "method": method | {"recalibrate": 0}}), tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), plain.model.parameters(), strict=True))
    norm, other = result.model.bn_last, plain.model.bn_last
    assert int(norm.num_batches_tracked) == 4
    assert not torch.allclose(norm.running_mean, other.running_mean, rtol=0.05)
    data = load("digits", folds=4)
    images, labels = normalize(data.test.images, *mean_std(data.train)), data.test.labels
    assert result.history[-1]["test_error"] == evaluate(result.model, images, labels)
    train_images = normalize(data.train.images, *mean_std(data.train)).split(256)
    resect.recalibrate(plain.model, itertools.islice(((x, None) for x in train_images), 4))
    assert torch.allclose(norm.running_mean, other.running_mean, rtol=0.2, atol=0.2)
