"""Cut timm models that plain ``timm.create_model`` builds and loads."""

from __future__ import annotations

import re

import pytest
import torch
from families import visible

import resect
from resect.errors import InputError, ProofError
from resect.shrink.compact import delete_layers

timm = pytest.importorskip("timm")
from resect.integrations import timm as citizen  # noqa: E402

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2}
SWIN = {"img_size": 56, "embed_dim": 12, "num_heads": (1, 2, 2, 2)}


def cut(name, size, layers, **options):
    torch.manual_seed(0)
    model, x = visible(timm.create_model(name, **options)).eval(), torch.randn(2, 3, size, size)
    blocks = resect.find_blocks(model, x)
    gone = [block for block in blocks if block.owner in layers]
    return resect.remove(model, blocks, gone, compact=True), x


@pytest.mark.parametrize(
    ("name", "size", "layers", "options", "line"),
    [
        ("vit_tiny_patch16_224", 32, ["blocks.1", "blocks.3"], SMALL_VIT, "depth=10,"),
        ("deit_tiny_patch16_224", 32, ["blocks.0"], {**SMALL_VIT, "num_classes": 5}, "depth=11, num_classes=5"),
        ("convnext_atto", 32, ["stages.2.blocks.1"], {}, r"depths=\(2, 2, 5, 2\)"),
        ("resnet18", 32, ["layer2.1", "layer3.1"], {}, r"layers=\(2, 1, 1, 2\)"),
        (
            "swin_tiny_patch4_window7_224",
            56,
            ["layers.2.blocks.2", "layers.2.blocks.3"],
            SWIN,
            r"depths=\(2, 2, 4, 2\)",
        ),
    ],
)
def test_the_line_builds_and_loads_exactly_what_is_left(tmp_path, name, size, layers, options, line):
    small, x = cut(name, size, layers, **options)
    told = {key: value for key, value in options.items() if key not in ("img_size", "num_classes")}
    shown = citizen.save(small, tmp_path / "cut.safetensors", x, **told)
    assert re.search(line, shown)
    again = eval(shown, {"timm": timm}).eval()
    assert torch.equal(again(x), small(x))
    assert list(again.state_dict()) == list(small.state_dict())


def test_what_create_model_cannot_say_is_refused_by_name(tmp_path):
    small, x = cut("efficientnet_b0", 32, ["blocks.2.1"])
    with pytest.raises(InputError, match=r"create_model\('efficientnet_b0'\) has no argument for the number of layers"):
        citizen.save(small, tmp_path / "cut.safetensors", x)
    assert not list(tmp_path.iterdir())


def test_a_window_that_would_shift_otherwise_is_refused_whatever_the_example(tmp_path):
    options = {"img_size": 64, "window_size": 2, "embed_dim": 12, "num_heads": (1, 2, 2, 2)}
    small, x = timm.create_model("swin_tiny_patch4_window7_224", **options), torch.zeros(1, 3, 64, 64)
    evidence = {"compact": delete_layers(small, ["layers.2.blocks.2"])}
    small.resect_plan = resect.Plan((), evidence=evidence)
    with pytest.raises(InputError, match=r"layers\.2\.blocks\.2\.shift_size is \(0, 0\) there, \(1, 1\) here"):
        citizen.save(small, tmp_path / "cut.safetensors", x, **options)


def test_bad_input(tmp_path):
    torch.manual_seed(0)
    x, model = (
        torch.randn(2, 3, 32, 32),
        visible(timm.create_model("vit_tiny_patch16_224", depth=3, **SMALL_VIT)).eval(),
    )
    blocks = resect.find_blocks(model, x)
    with pytest.raises(InputError, match="files named"):
        citizen.save(model, tmp_path / "cut.bin", x)
    with pytest.raises(InputError, match="No whole layer went"):
        citizen.save(model, tmp_path / "cut.safetensors", x)
    part = resect.remove(model, blocks, [blocks[0].name])
    with pytest.raises(InputError, match=r"layers that lack a branch, and here .*blocks\.0\.attn"):
        citizen.save(part, tmp_path / "cut.safetensors", x)
    with pytest.raises(InputError, match="does not carry the name"):
        citizen.save(torch.nn.Linear(2, 2), tmp_path / "cut.safetensors", x)
    whole = resect.remove(model, blocks, blocks.select(blocks.names[:2]), compact=True)
    with pytest.raises(InputError, match="If you built it with further arguments, pass them too"):
        citizen.save(whole, tmp_path / "cut.safetensors", x)  # patch_size, embed_dim, num_heads not told


def test_a_file_that_does_not_give_the_model_back_is_not_left(tmp_path, monkeypatch):
    small, x = cut("resnet18", 32, ["layer2.1"])
    answers = iter(["", "output 0 differs by up to 1"])
    monkeypatch.setattr(citizen, "_differs", lambda *args: next(answers))
    with pytest.raises(ProofError, match="does not give the model that was saved"):
        citizen.save(small, tmp_path / "cut.safetensors", x)
    assert not list(tmp_path.iterdir())
