"""Removing, saving and loading: what is proven, what is refused, what stays whole when something fails."""

from __future__ import annotations

import errno
import json
import os
import warnings

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.blocks.absent import Absent
from resect.errors import AttachError, FileError, InputError, ProofError
from resect.shrink import files
from resect.shrink import remove as removing

pytestmark = pytest.mark.core


@pytest.fixture
def setup():
    torch.manual_seed(0)
    net, x = Net((False, True, False)).eval(), torch.randn(4, 5)
    return net, x, resect.find_blocks(net, x)


def test_what_is_left_is_a_smaller_model_and_the_original_is_untouched(setup):
    net, x, blocks = setup
    before = net(x)
    small = resect.remove(net, blocks, ["layers.0", "layers.1/b"])
    assert torch.equal(net(x), before)
    assert type(small) is Net
    assert small.resect_plan.names == ["layers.0/a", "layers.1/b"]
    # By hand: the same net without those two branches.
    stream = net.stem(x)
    stream = stream + net.layers[1].a(stream)
    stream = stream + net.layers[2].a(stream)
    assert torch.equal(small(x), net.head(stream))
    assert "layers.0/a" in repr(small)


def test_in_place_changes_the_model_itself(setup):
    net, _x, blocks = setup
    assert resect.remove(net, blocks, "layers.0", in_place=True) is net
    assert not list(net.layers[0].parameters())


def test_a_failed_proof_returns_nothing_and_leaves_an_in_place_model_whole(setup, monkeypatch):
    net, x, blocks = setup
    before, keys = net(x), list(net.state_dict())

    def wrong(self, *args, **kwargs):
        return args[0] * 0.5 if self.block.name == "layers.0/a" else Absent(0, self.block)

    monkeypatch.setattr(removing.Removed, "forward", wrong)
    with pytest.raises(ProofError, match=r"layers.0/a.*does not give the closed model.*differs by up to"):
        resect.remove(net, blocks, "layers.0", in_place=True)
    assert list(net.state_dict()) == keys
    assert torch.equal(net(x), before)


class Gamma(nn.Module):
    """A raw layer scale between the branch's module and its drop path."""

    def __init__(self):
        super().__init__()
        self.f, self.gamma, self.drop = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.5)), nn.Identity()

    def forward(self, x):
        return x + self.drop(self.f(x) * self.gamma)


def test_blocks_inside_one_another_come_back_where_they_were(monkeypatch):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(6, 6), Net((False,)).layers[0], nn.Linear(6, 6))
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x + self.branch(x))

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), Around(), Around()).eval(), torch.randn(4, 5)
    blocks = resect.find_blocks(net, x) + resect.block(net, x, branch="1.branch.1.a")
    names = ["1.branch.1/a", "1/branch"]
    before, keys = net(x), list(net.state_dict())
    monkeypatch.setattr(removing, "compare", lambda *_: "it was made to")
    with pytest.raises(ProofError, match="it was made to"):
        resect.remove(net, blocks, names, in_place=True)
    assert list(net.state_dict()) == keys
    assert torch.equal(net(x), before)


def test_a_raw_parameter_goes_with_its_branch_and_comes_back_when_loaded(tmp_path):
    net, x = Gamma(), torch.randn(2, 4)
    blocks = resect.find_blocks(net, x)
    assert blocks[0].raw_parameters == ("gamma",)
    small = resect.remove(net, blocks, blocks.names)
    assert not small.state_dict()
    assert torch.equal(small(x), x)
    resect.save(small, tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", Gamma())(x), x)


def test_bad_plans(setup):
    net, x, blocks = setup
    with pytest.raises(InputError, match=r"Did you mean 'layers\.2/a'"):
        resect.remove(net, blocks, ["layers.2/aa"])
    with pytest.raises(InputError, match="removes nothing"):
        resect.remove(net, blocks, [])
    other = Net((False,) * 5)
    plan = resect.Plan.of(resect.find_blocks(other, x), ["layers.4"])
    with pytest.raises(InputError, match=r"(?s)another model than this Net.*it has no block layers.4/a"):
        resect.remove(net, blocks, plan)
    with resect.EpsilonGate(net, blocks, epsilon=1e-6), pytest.raises(AttachError, match="still has EpsilonGate"):
        resect.remove(net, blocks, "layers.0")


def test_a_plan_for_another_model_is_refused_with_the_differences_by_name(setup):
    net, x, blocks = setup
    plan = resect.rank(net, blocks[:2], by="last").choose(1)  # of a selection: the plan knows all there are
    assert plan.among == tuple(blocks.names)

    def told(model, plan=plan):
        with pytest.raises(InputError, match="another model than this") as caught:
            resect.remove(model, resect.find_blocks(model.eval(), x), plan)
        return str(caught.value)

    class Other(Net):
        pass

    assert told(Net((False, True, False, False))).endswith("it has a block layers.3/a, unknown to the plan")
    assert told(Net((False, True))).endswith("it has no block layers.2/a")
    assert told(Other((False, True, False))).endswith("its class is Other, and the plan has Net")
    assert told(Net((False, True, False), width=8)).endswith(
        "layers.0/a has 296 parameters here, and 174 parameters in the plan"
    )
    with pytest.raises(InputError, match=r"not among the blocks given: layers.0/a"):
        resect.remove(net, blocks[2:], resect.Plan.of(blocks, "layers.0"))

    same = Net((False, True, False)).eval()  # other weights, and a selection of its blocks
    found = resect.find_blocks(same, x)
    assert resect.remove(same, found.select(plan.names), plan).resect_plan.names == plan.names
    older = {key: value for key, value in plan.to_json().items() if key != "among"}
    longer = Net((False, True, False, False)).eval()
    resect.remove(longer, resect.find_blocks(longer, x), resect.Plan.from_json(older))  # says no more than it did
    small = resect.remove(net, blocks, plan)
    again = resect.remove(small, resect.find_blocks(small, x), "layers.2")
    assert resect.remove(net, blocks, again.resect_plan).resect_plan.names == again.resect_plan.names


def test_a_plan_survives_json_and_damaged_ones_are_refused(setup, tmp_path):
    _net, _, blocks = setup
    plan = resect.Plan(tuple(blocks[:2]), by="lesion", scores={"layers.0/a": 0.5}, evidence={"n": [1]}, model="Net")
    plan.save(tmp_path / "plan.json")
    assert resect.Plan.load(tmp_path / "plan.json") == plan
    whole = (tmp_path / "plan.json").read_text()
    for text in (whole[: len(whole) // 2], "{}", "[]", whole.replace('"version": 1', '"version": 9')):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(FileError, match="Cannot read the plan"):
            resect.Plan.load(tmp_path / "plan.json")
    with pytest.raises(FileError, match="No such file"):
        resect.Plan.load(tmp_path / "nowhere.json")


def test_saving_and_loading_refuse_what_is_not_theirs(setup, tmp_path):
    net, _x, blocks = setup
    with pytest.raises(InputError, match=r"cut by resect\.remove"):
        resect.save(net, tmp_path / "cut")
    small = resect.remove(net, blocks, "layers.0")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"holds 'thesis\.tex', not written here"):
        resect.save(small, tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.tex").exists()
    resect.save(small, tmp_path / "cut")
    with pytest.raises(InputError, match=r"is not the Net that was cut: no module 'layers\.0\.a'"):
        resect.load(tmp_path / "cut", nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match=r"is \(6, 5\) in the file and \(8, 5\) in the model"):
        resect.load(tmp_path / "cut", Net((False, True, False), width=8))
    with pytest.raises(FileError, match=r"has no plan\.json"):
        resect.load(tmp_path, net)


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "plan"])
def test_damaged_files_are_named(setup, tmp_path, damage):
    net, _, blocks = setup
    resect.save(resect.remove(net, blocks, "layers.0"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    data = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(data[:-7])
    elif damage == "flip":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (tmp_path / "cut" / "plan.json").write_text('{"format": "something else"}')
    with pytest.raises(FileError, match=r"is damaged|has no model\.safetensors|Cannot read"):
        resect.load(tmp_path / "cut", Net((False, True, False)))


def test_a_full_disk_leaves_the_old_folder_whole(setup, tmp_path, monkeypatch):
    net, x, blocks = setup
    first = resect.remove(net, blocks, "layers.0")
    resect.save(first, tmp_path / "cut")
    expected = first(x)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_model", full)
    with pytest.raises(FileError, match="No space left on device"):
        resect.save(resect.remove(net, blocks, "layers.2"), tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", Net((False, True, False))).eval()(x), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"], "nothing half-written stays behind"


def test_saving_again_replaces_the_folder(setup, tmp_path):
    net, _x, blocks = setup
    for name in ("layers.0", "layers.2"):
        small = resect.remove(net, blocks, name)
        resect.save(small, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "plan.json").read_text())["blocks"][0]["name"] == "layers.2/a"
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_tied_weights_are_stored_once_and_loaded_into_both(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__((False, False), width=5, classes=5)
            self.head.weight = self.stem.weight

    net, x = Tied().eval(), torch.randn(2, 5)
    small = resect.remove(net, resect.find_blocks(net, x), "layers.0")
    resect.save(small, tmp_path / "cut")
    again = resect.load(tmp_path / "cut", Tied().eval())
    assert again.head.weight is again.stem.weight
    assert torch.equal(again(x), small(x))


def test_a_model_is_cut_again_and_again_and_still_loads(setup, tmp_path):
    net, x, blocks = setup
    once = resect.remove(net, blocks, "layers.0")
    twice = resect.remove(once, resect.find_blocks(once, x), "layers.2")
    assert twice.resect_plan.names == ["layers.0/a", "layers.2/a"]
    resect.save(twice, tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", Net((False, True, False)).eval())(x), twice(x))


def test_weights_that_would_change_on_loading_are_refused(setup, tmp_path):
    net, _, blocks = setup
    resect.save(resect.remove(net, blocks, "layers.0"), tmp_path / "cut")
    for other in (Net((False, True, False)).half(), Net((False, True, False)).to("meta")):
        with pytest.raises(InputError, match=r"did not survive loading|on the meta device"):
            resect.load(tmp_path / "cut", other)


class Left(nn.Module):
    """A raw layer scale on the left of the branch."""

    def __init__(self):
        super().__init__()
        self.f, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        return x + self.gamma * self.f(x)


def test_a_raw_parameter_left_of_its_branch():
    net, x = Left(), torch.randn(2, 4)
    blocks = resect.find_blocks(net, x)
    assert torch.equal(resect.remove(net, blocks, blocks.names)(x), x)


def test_what_is_gone_cannot_be_removed_again(setup):
    model, _, blocks = setup
    small = resect.remove(model, blocks, blocks.names[:1])
    with pytest.raises(InputError, match=r"Already removed .* Find the blocks of what is left"):
        resect.remove(small, blocks, blocks.names[:2])


class Normed(nn.Module):
    """Weights computed before each call, and a map that somebody keeps to look at."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.f, self.g = (torch.nn.utils.weight_norm(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x):
        x = x + self.f(x).relu()
        self.map = self.g(x).softmax(-1)
        return x + self.map


def test_a_model_that_keeps_values_with_gradients_is_copied(tmp_path):
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    model(x).sum().backward()
    small = resect.remove(model, blocks, ["f"])
    resect.save(small, tmp_path / "cut")
    again = resect.load(tmp_path / "cut", Normed())
    assert torch.equal(small(x), again(x))
    again(x).sum().backward()
    with torch.inference_mode():
        copy = resect.remove(model, blocks, ["f"])
    copy(x).sum().backward()
    assert copy.g.weight_g.grad is not None


def test_the_forms_that_a_removed_module_remembers_are_bounded(monkeypatch):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.map = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.norm(x)
            batch, length, width = h.shape
            return x + self.map(h).view(batch, length, width)

    monkeypatch.setattr("resect.blocks.twin.FORMS", 3)
    net = nn.Sequential(Asking(), nn.Linear(4, 4)).eval()
    small = resect.remove(net, resect.find_blocks(net, torch.randn(2, 5, 4)), "0")
    for length in (1, 2, 3, 4, 5, 2, 1, 7):
        x = torch.randn(2, length, 4)
        assert torch.equal(small(x), net[1](x))
        assert 0 < max(len(vars(module).get("_resect_forms", ())) for module in small.modules()) <= 3


def test_a_plan_that_was_carried_out_says_what_goes_and_not_what_was_done(tmp_path):
    torch.manual_seed(0)
    net, x = Net((False, False, False)).eval(), torch.randn(4, 5)
    blocks = resect.find_blocks(net, x)
    compact = resect.remove(net, blocks, ["layers.0"], compact=True)
    replaced = resect.replace(net, blocks, ["layers.0"], [torch.randn(4, 5) for _ in range(2)])
    for done in (compact.resect_plan, replaced.resect_plan):
        small = resect.remove(net, blocks, done)
        assert not {"compact", "replaced"} & small.resect_plan.evidence.keys()
        resect.save(small, tmp_path / "cut")
        assert torch.equal(resect.load(tmp_path / "cut", Net((False, False, False)))(x), small(x))
    again = resect.replace(net, blocks, compact.resect_plan, [torch.randn(4, 5) for _ in range(2)])
    assert "compact" not in again.resect_plan.evidence
