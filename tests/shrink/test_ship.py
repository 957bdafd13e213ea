"""What a saved model says of itself, and what is refused: pickles, damage, a full disk. Each is really tried."""

from __future__ import annotations

import json
import pickle
import resource

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.errors import FileError, InputError

pytestmark = pytest.mark.core


def cut(which: str = "layers.1", width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    net, x = Net((False,) * 4, width=width).eval(), torch.randn(4, 5)
    data = [(torch.randn(20, 5), torch.randint(4, (20,)))]
    blocks = resect.find_blocks(net, x)
    ranking = resect.rank(net, blocks, data, metric="cross_entropy")
    plan = resect.Plan(tuple(blocks.select([which])), "lesion", ranking.scores, {"top1": {"before": 90.5}}, "Net")
    return resect.remove(net, blocks, plan, compact=True)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_card_says_what_went_why_and_how_to_load(tmp_path):
    small = cut()
    resect.save(small, tmp_path / "cut")
    text = (tmp_path / "cut/README.md").read_text()
    plan = small.resect_plan
    for said in (
        "# Net, cut",
        "Chosen by: lesion",
        f"| `{plan.names[0]}` | identity | {plan.blocks[0].parameters:,} | {plan.scores[plan.names[0]]:+.4g} |",
        '"before": 90.5',
        "resect.load(FOLDER, model)",
        "whole layers went (`layers.1`)",
        f"{sum(p.numel() for p in small.parameters()):,} parameters are left",
    ):
        assert said in text
    kept = min(score for name, score in plan.scores.items() if name not in plan.names)
    assert (
        f"lowest score that stayed: `{min(plan.scores.keys() - plan.names, key=plan.scores.get)}`, {kept:+.4g}" in text
    )


class Two(nn.Module):
    """Layers of two branches."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Pair() for _ in range(count)))

    def forward(self, x):
        return self.layers(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = x + self.a(x)
        return x + self.b(x)


@pytest.mark.parametrize("more", [[], ["layers.2/a"]])
def test_the_card_says_that_a_shorter_model_takes_the_weights_only_where_it_does(tmp_path, more):
    net, x = Two(3).eval(), torch.randn(4, 5)
    small = resect.remove(net, resect.find_blocks(net, x), ["layers.1/a", "layers.1/b", *more], compact=True)
    resect.save(small, tmp_path / "cut")
    text = (tmp_path / "cut/README.md").read_text()
    assert Two(2).state_dict().keys() == small.state_dict().keys() or more
    assert ("fits the same class" in text) == (not more)
    assert ("resect.export" in text) == bool(more)


def test_a_part_of_a_larger_tensor_is_saved_and_ties_stay_ties(tmp_path):
    class Sliced(Net):
        def __init__(self) -> None:
            super().__init__((False,) * 3)
            whole = torch.arange(40.0).reshape(8, 5)
            self.register_buffer("part", whole[2:6])
            self.register_buffer("same", whole[2:6])
            self.register_buffer("crossing", whole[3:7])
            self.tied = self.head

    net, x = Sliced().eval(), torch.randn(4, 5)
    small = resect.remove(net, resect.find_blocks(net, x), "layers.1")
    resect.save(small, tmp_path / "cut")
    safetensors = pytest.importorskip("safetensors.torch")
    stored = safetensors.load_file(tmp_path / "cut/model.safetensors").keys()
    assert len(stored & {"part", "same"}) == len(stored & {"head.weight", "tied.weight"}) == 1
    assert "crossing" in stored
    fresh = Sliced().eval()
    fresh.part.zero_()
    again = resect.load(tmp_path / "cut", fresh)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in small.state_dict().items())
    assert small.part.untyped_storage().nbytes() == 160


@pytest.mark.parametrize("how", ["file", "file of another name", "old", "plain", "folder"])
def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path, how):
    path = tmp_path / ("weights" if how == "file of another name" else "weights.pt")
    if how == "plain":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save(cut().state_dict(), path, _use_new_zipfile_serialization=how != "old")
    with pytest.raises(FileError, match=r"is a pickle[\s\S]*weights_only=True[\s\S]*save_model") as raised:
        resect.load(tmp_path if how == "folder" else path, Net((False,) * 4))
    if how == "file":  # the advice works
        net, st = Net((False,) * 3), pytest.importorskip("safetensors.torch")
        net.load_state_dict(torch.load(path, weights_only=True))
        st.save_model(net, str(tmp_path / "model.safetensors"))
    assert str(path) in str(raised.value)


def test_what_is_damaged_or_foreign_is_told_from_what_is_not(tmp_path):
    folder, fresh = tmp_path / "cut", Net((False,) * 4)
    resect.save(cut(), folder)
    whole = contents(folder)
    weights = whole["model.safetensors"]
    plan = json.loads(whole["plan.json"])
    for name, content, message in [
        ("model.safetensors", weights[:-1], "is damaged"),
        ("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]), "is damaged"),
        ("model.safetensors", None, "Cannot read"),
        ("plan.json", whole["plan.json"][:-9], "Cannot read"),
        ("plan.json", b"{}", "not a plan written by Resect"),
        ("plan.json", json.dumps({**plan, "files": {}}).encode(), "a plan alone"),
        ("plan.json", None, "it has no plan.json"),
    ]:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(FileError, match=message):
            resect.load(folder, fresh)
        (folder / name).write_bytes(whole[name])
    with pytest.raises(FileError, match=r"it has no plan\.json"):
        resect.load(tmp_path / "nowhere", fresh)
    with pytest.raises(InputError, match="is not the Net that was cut"):
        resect.load(folder, Net((False,) * 4, width=7))
    assert resect.load(folder, fresh).resect_plan.names == cut().resect_plan.names


def test_of_many_differences_the_first_are_listed(tmp_path):
    resect.save(cut(), tmp_path / "cut")
    with pytest.raises(InputError, match=r"24 problems(\n  - .*){8}\n  … and 16 more$"):
        resect.load(tmp_path / "cut", Net((False,) * 8, width=6))


@pytest.mark.parametrize("limit", [500, 5000, 40_000], ids=["any file", "the plan", "the weights"])
def test_without_space_the_folder_before_stays(tmp_path, limit):
    folder = tmp_path / "cut"
    resect.save(cut(), folder)
    before, other = contents(folder), cut("layers.2", width=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a real refusal by the system: EFBIG instead of ENOSPC
    try:
        with pytest.raises(
            FileError, match=r"Cannot write '.*cut': File too large. What was there before is unchanged"
        ):
            resect.save(other, folder)
        with pytest.raises(FileError, match="File too large"):
            resect.save(other, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]
    resect.save(other, folder)
    assert contents(folder) != before
