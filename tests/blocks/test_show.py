"""Blocks as text: every line fits, nothing that tells two blocks apart is cut, refusals say what is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from nets import Net
from torch.utils.flop_counter import FlopCounterMode

from resect.blocks import choose, show
from resect.blocks.block import Blocks, Refusal, ResidualBlock
from resect.blocks.find import find_blocks

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def one() -> ResidualBlock:
    return find_blocks(Net().eval(), torch.randn(3, 5))[0]


def many(one: ResidualBlock, number: int, prefix: str = "", **changes: object) -> list[ResidualBlock]:
    """Return blocks in ``number`` layers of two: attention and MLP."""
    made = []
    for place in range(2 * number):
        owner, part = f"{prefix}layers.{place // 2}", ("attention", "mlp")[place % 2]
        modules = tuple(f"{owner}.{name}" for name in ("norm", "query", "key", "value", "drop", "out"))
        made.append(
            dataclasses.replace(
                one, name=f"{owner}/{part}", owner=owner, index=place, part=part, modules=modules,
                parameters=1234567 + place, **changes,
            )
        )  # fmt: skip
    return choose.number_stages(made)


def lines(blocks: Blocks, width: int, rows: int | None = None) -> list[str]:
    return show.table(blocks, width, rows).splitlines()


def test_the_summary_counts_blocks_and_layers(one):
    assert show.summary(Blocks(many(one, 12), model="ViT")) == "24 residual blocks in 12 layers of ViT: attention, MLP"
    assert show.summary(Blocks([one], model="Net")) == "1 residual block in 1 layer of Net"
    assert show.summary(Blocks([], model="VGG")) == "no residual blocks in VGG"
    refused = [Refusal("a", "because")]
    assert show.summary(Blocks([], model="VGG", refused=refused)) == "no residual block of VGG can be controlled"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("prefix", ["", "student.model.language_model.transformer."])
def test_no_line_is_wider_than_the_terminal_and_no_two_rows_are_alike(one, width, prefix):
    refused = [Refusal(f"{prefix}layers.{i}", f"parameter '{prefix}w{i}' is also used elsewhere") for i in range(9)]
    found = lines(Blocks(many(one, 12, prefix), model="M", refused=refused), width)
    rows = [row for row in found if re.match(r" *\d+  \S", row)]
    assert len(rows) == 24
    assert all(len(line) <= width or " " not in line.strip() for line in found)  # a word alone is not broken
    assert len({row.split(maxsplit=1)[1].split("  ")[0] for row in rows}) == 24


def test_without_a_width_everything_is_there(one):
    block = many(one, 1, "a.very.long.path.to.the.place.where.the.blocks.are.")[0]
    text = show.table(Blocks([block]), 0)
    assert block.name in text
    assert "norm query key value drop out" in text
    assert "1,234,567" in text
    assert "…" not in text


def test_names_that_are_cut_can_be_put_together_again(one):
    text = show.table(Blocks(many(one, 2, "a.very.long.path.to.the.place.where.they.are.")), 70)
    assert "…layers.1/mlp" in text
    assert "'a.very.long.path.to.the.place.where.they.are.'" in text


def test_a_long_table_shows_its_two_ends(one):
    found = lines(Blocks(many(one, 100)), 100, rows=30)
    rows = [row for row in found if re.match(r" *\d+  \S", row)]
    assert [rows[0].split()[0], rows[-1].split()[0], len(rows)] == ["0", "199", 30]
    place = found.index("… 170 more …")
    assert found[place - 1].split()[0] == "19"
    assert found[place + 1].split()[0] == "190"


def test_modules_are_cut_in_their_middle():
    assert show.cut_words("conv1 bn1 conv2 bn2 conv3 bn3", 20) == "conv1 bn1 … bn3"
    assert show.cut_words("conv1 bn1", 20) == "conv1 bn1"
    assert len(show.cut_words("intermediate.dense output.LayerNorm", 16)) == 16
    assert show.cut("abcdefgh", 5) == "ab…gh"


def test_what_cannot_be_done_is_said_with_its_reason(one):
    whole = many(one, 2)
    bound = dataclasses.replace(whole[1], end=None, reason="functions follow its last module")
    text = show.table(Blocks([whole[0], bound, *whole[2:]]), 100)
    assert "Every block can be closed and removed." in text
    assert "1 of 4 cannot be scaled (layers.0/mlp): functions follow its last module." in text
    assert re.search(r"^1 .* scaled$", text, re.MULTILINE)
    assert "cannot be scaled: functions follow its last module" in show.line(bound)
    assert "cannot" not in show.table(Blocks(whole), 100)


def test_equal_refusals_are_one_line():
    refused = [Refusal(f"h.{i}", f"parameter 'h.{i}.w' is also used in 'h.{i + 1}'") for i in range(5)]
    refused.append(Refusal("head", "the branch has no module of its own"))
    text = show.refusals(refused)
    assert text[0] == "6 residual additions refused:"
    assert text[1] == "  h.0, h.1, … h.4 (5 ×): parameter 'h.0.w' is also used in 'h.1'"
    assert text[2] == "  head: the branch has no module of its own"
    assert show.refusals([]) == []


def test_one_block_is_one_line(one):
    text = show.line(many(one, 1)[1])
    assert "\n" not in text
    assert text.startswith("layers.0/mlp: residual block 1, identity shortcut, MLP branch (norm query")
    assert "1,234,568 parameters" in text
    assert str(many(one, 1)[1]) == text


def test_the_share_of_operations_is_of_the_whole_model(one):
    net, x = Net().eval(), torch.randn(3, 5)
    blocks = find_blocks(net, x)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert blocks.flops == counter.get_total_flops()
    assert blocks[:1].flops == blocks.flops, "a selection still tells its share of the whole model"
    text = show.table(Blocks([dataclasses.replace(one, flops=1000)], flops=4000), 100)
    assert "25.0 %" in text
    assert "4,000 on the example" in text
    assert "FLOPs" not in show.table(Blocks([one]), 100)


@pytest.mark.parametrize(
    ("owner", "layer"),
    [
        ("encoder.layer.3.attention.output", "encoder.layer.3"),
        ("layer3.4", "layer3.4"),
        ("stages.0.blocks.2", "stages.0.blocks.2"),
        ("0.1", "0.1"),
        ("head", "head"),
        ("", ""),
    ],
)
def test_the_layer_of_an_owner(owner, layer):
    assert choose.layer_of(owner) == layer


def test_stages_are_runs_in_one_container(one):
    blocks = Blocks(choose.number_stages(many(one, 2, "encoder.") + many(one, 1, "decoder.")))
    assert blocks.stage(2).names == ["decoder.layers.0/attention", "decoder.layers.0/mlp"]
    assert {number: len(group) for number, group in blocks.stages().items()} == {1: 4, 2: 2}
    assert blocks[4:].stage(2).names == blocks.stage(2).names, "a selection keeps the numbers of the whole"
    with pytest.raises(ValueError, match=r"There is no stage 7 here\. Stages: 1, 2\."):
        blocks.stage(7)


def test_stages_also_change_with_the_shape(one):
    wide = [dataclasses.replace(block, shape=(1, 2)) for block in many(one, 1)]
    assert [block.stage for block in choose.number_stages([*many(one, 2), *wide])] == [1, 1, 1, 1, 2, 2]


def test_a_layer_holds_blocks_of_several_owners(one):
    owners = ["encoder.layer.0.attention.output", "encoder.layer.0.output", "encoder.layer.1.output", "head"]
    blocks = Blocks(dataclasses.replace(one, owner=owner, name=f"{owner}/f") for owner in owners)
    assert {layer: len(group) for layer, group in blocks.layers().items()} == {
        "encoder.layer.0": 2, "encoder.layer.1": 1, "head": 1,
    }  # fmt: skip


def test_what_can_be_done_is_part_of_the_json_and_follows_from_the_rest(one):
    bound = dataclasses.replace(one, end=None, reason="functions follow its last module")
    blocks = Blocks([one, bound], model="Net", flops=7)
    data = json.loads(json.dumps(blocks.to_json()))
    assert [item["scalable"] for item in data["blocks"]] == [True, False]
    assert all(item["closable"] and item["removable"] for item in data["blocks"])
    again = Blocks.from_json(data)
    assert list(again) == [one, bound]
    assert again.flops == 7
    data["blocks"][0]["scaleable"] = True
    with pytest.raises(ValueError, match="'scaleable'"):
        Blocks.from_json(data)


def test_parts_by_name(one):
    blocks = Blocks(many(one, 3))
    assert [block.part for block in blocks.part("MLP")] == ["mlp"] * 3
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        blocks.part("atention")
