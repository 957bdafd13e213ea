"""Training goes on from a cut model, with the uncut one as its teacher."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TINY, Stop, stop_after, tiny

import resect
from resect.errors import FileError, InputError
from resect.lab import recipe, runs
from resect.lab.open import open_model, save_cut
from resect.lab.scratch import from_scratch
from resect.lab.shrink.recovering import recover
from resect.lab.trainer import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trained net, and what was cut from it."""
    home = tmp_path_factory.mktemp("healing")
    train(tiny(epochs=2), home / "full")
    opened = open_model(str(home / "full"))
    blocks = resect.find_blocks(opened.model, opened.example())
    save_cut(resect.remove(opened.model, blocks, blocks.names[1:2]), home / "cut", opened)
    return home


def healing(folders, **distill):
    whole = tiny(epochs=2, lr=0.02)
    table = {"teacher": str(folders / "full"), **distill}
    return runs.started_from(recipe.parse({**whole.dump(), "distill": table}), folders / "cut")


def test_healing_resumes_to_the_bit_and_its_folder_opens_everywhere(folders, tmp_path):
    wanted = healing(folders, features=["layer1"], weight=0.5)
    cut = open_model(str(folders / "cut")).model
    assert wanted.model.start == str(folders / "cut")
    whole = train(wanted, tmp_path / "whole")
    with pytest.raises(Stop):
        train(wanted, tmp_path / "parts", resume=True, progress=stop_after(1))
    resumed = train(runs.recipe_of(tmp_path / "parts"), tmp_path / "parts", resume=True)
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == cut.state_dict().keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(one["fc.weight"], cut.state_dict()["fc.weight"])
    assert whole.history[-1]["distil_logits"] > 0 < whole.history[-1]["distil_features"]

    uncut = runs.build_model(wanted, open_model(str(folders / "full")).data)
    for again in (open_model(str(tmp_path / "whole")).model, resect.load(tmp_path / "whole", uncut)):
        assert all(torch.equal(value, one[key]) for key, value in again.state_dict().items())
        assert again.resect_plan.names == cut.resect_plan.names


def test_a_run_can_be_gone_on_from_too(folders):
    wanted = runs.started_from(tiny(), folders / "full")
    model, _, data = runs.open_run(folders / "full")
    started = runs.starting_model(wanted, data)
    assert all(torch.equal(value, started.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_does_not_fit_is_told(folders, tmp_path):
    with pytest.raises(FileError, match=r"neither recipe.json nor base.json"):
        runs.started_from(tiny(), tmp_path)
    with pytest.raises(InputError, match=r"distill.temprature: Unknown key 'temprature'. Did you mean 'temperature'"):
        recipe.parse({**TINY, "distill": {"teacher": "full", "temprature": 2.0}})
    with pytest.raises(InputError, match=r"distill.teacher"):
        recipe.parse({**TINY, "distill": {"temperature": 2.0}})
    with pytest.raises(InputError, match="does not go with a teacher"):
        recipe.parse({**tiny(compile=True).dump(), "distill": {"teacher": "full"}})
    with pytest.raises(FileError, match="There is no folder"):
        train(healing(folders, teacher="no/where"), tmp_path / "run")
    with pytest.raises(InputError, match="leave out --from"):
        runs.wanted(str(folders / "full"), [], None, True, folders / "cut")


def test_recovering_teaches_the_cut_net_and_leaves_its_teacher_alone(folders):
    opened = open_model(str(folders / "full"))
    before = {key: value.clone() for key, value in opened.model.state_dict().items()}
    nets = [open_model(str(folders / "cut")).model for _ in range(3)]
    random, found, losses = torch.get_rng_state(), [], []
    for small, epochs in zip(nets, (1, 1, 6), strict=True):
        losses.append(recover(small, opened, epochs))
        assert not small.training
        found.append(small.state_dict())
    assert losses[2] < losses[0] - 0.05  # a teacher that knows little, and few steps
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert all(torch.equal(value, before[key]) for key, value in opened.model.state_dict().items())


def test_recovering_by_mimicking_needs_no_labels_and_goes_through_the_first_samples(folders):
    opened = open_model(str(folders / "full"))
    small, other = (open_model(str(folders / "cut")).model for _ in range(2))
    loss = recover(small, opened, 2, by="mimic", limit=100)
    images, _ = opened.images("train", 100)
    losses = resect.mimic(other, opened.model, [images], steps=4, samples=100)  # two batches of 64 go through 100
    assert loss == losses[-1]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in small.state_dict().items())


def test_from_scratch_trains_the_cut_shape_alone_from_the_recipes_seed(folders, tmp_path):
    plan = open_model(str(folders / "cut")).model.resect_plan
    wanted = healing(folders)  # of its start and its teacher nothing is left
    net = from_scratch(wanted, plan, tmp_path / "scratch")
    full = open_model(str(folders / "full"))
    torch.manual_seed(wanted.train.seed)
    fresh = runs.build_model(wanted, full.data)
    blocks = resect.find_blocks(fresh, full.example())
    other = train(tiny(epochs=2, lr=0.02), tmp_path / "other", model=resect.remove(fresh, blocks, plan.names)).model
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())
    again = open_model(str(tmp_path / "scratch")).model
    assert again.resect_plan.names == plan.names
    assert not net.training
