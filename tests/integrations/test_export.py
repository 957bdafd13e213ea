"""Exported files compute what the model computes, at any batch size, or are not kept."""

from __future__ import annotations

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.errors import AttachError, ExportError, FileError, InputError, ProofError
from resect.integrations import formats

FORMATS = ["onnx", "pt2"]


def needs(format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")


def cut():
    torch.manual_seed(0)
    net, x = Net((False, True, False)).eval(), torch.randn(3, 5)
    blocks = resect.find_blocks(net, x)
    return resect.remove(net, blocks, blocks.names[:1]), x


def run(path, x):
    """What somebody without Resect does with the file."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1, 3])
def test_a_cut_net_takes_any_batch(format, size, tmp_path):
    needs(format)
    small, x = cut()
    small.train()
    done = resect.export(small, tmp_path / "deep" / f"net.{format}", example=x[:size])
    assert small.training
    assert done.format == format
    assert done.difference < 1e-5
    assert set(done.batches) == {1, max(size, 2), max(size, 2) + 1}
    assert [file.name for file in done.path.parent.iterdir()] == [f"net.{format}"]
    small.eval()
    for rows in (1, 2, 7):
        x = torch.randn(rows, 5)
        assert torch.allclose(run(done.path, x), small(x), atol=1e-5)


def test_what_was_removed_is_not_in_the_file(tmp_path):
    small, x = cut()
    net = Net((False, True, False)).eval()
    resect.export(net, tmp_path / "whole.pt2", example=x)
    resect.export(small, tmp_path / "cut.pt2", example=x)
    counts = [
        sum("linear" in str(node.target) for node in torch.export.load(tmp_path / name).graph.nodes)
        for name in ("whole.pt2", "cut.pt2")
    ]
    assert counts[0] - counts[1] == 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["resnet", "vit", "language model"])
def test_real_families(family, format, tmp_path):
    needs(format)
    torch.manual_seed(0)
    if family == "language model":
        transformers = pytest.importorskip("transformers")
        config = transformers.Qwen3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                          num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config).eval()
        x = {"input_ids": torch.randint(50, (2, 6))}
    else:
        timm = pytest.importorskip("timm")
        if family == "vit":
            model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, num_classes=10)
        else:
            model = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=10)
        x = torch.randn(2, 3, 32, 32)
    blocks = resect.find_blocks(model.eval(), x)
    small = resect.remove(model, blocks, blocks.names[1:3])
    done = resect.export(small, tmp_path / f"small.{format}", example=x)
    assert done.difference < 1e-4
    assert done.batches == (2, 3, 1)
    assert str(done).startswith(str(done.path))
    if family == "language model":
        assert small.config.use_cache
        if format == "pt2":
            with pytest.raises(ExportError, match="cannot be exported: it hands back its cache: put use_cache=False"):
                resect.export(small, tmp_path / "no.pt2", example={**x, "use_cache": True})
            assert small.config.use_cache


class Fixed(Net):
    def forward(self, x):
        return super().forward(x).view(3, 4)


class Asking(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Bessel(Net):
    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


class Several(Net):
    def forward(self, *inputs):
        return super().forward(inputs[0])


def test_a_fixed_batch_is_said_and_can_be_had(tmp_path):
    net, x = Fixed((False, False)).eval(), torch.randn(3, 5)
    with pytest.raises(ExportError, match="fixes the batch size: pass dynamic=False"):
        resect.export(net, tmp_path / "net.pt2", example=x)
    assert not list(tmp_path.iterdir())
    assert resect.export(net, tmp_path / "net.pt2", example=x, dynamic=False).batches == (3,)


def test_what_cannot_be_exported_is_named(tmp_path):
    x = torch.randn(3, 5)
    with pytest.raises(ExportError, match=r"test_export\.py:\d+: return super\(\)\.forward\(x\) if x\.sum\(\) > 0"):
        resect.export(Asking((False,)), tmp_path / "net.pt2", example=x)
    with pytest.raises(InputError, match=r"\*args"):
        resect.export(Several((False,)), tmp_path / "net.pt2", example=x)
    needs("onnx")
    with pytest.raises(ExportError, match=r"no counterpart of \S*bessel_j0\. format='pt2'"):
        resect.export(Bessel((False,)), tmp_path / "net.onnx", example=x)
    assert not list(tmp_path.iterdir())
    resect.export(Bessel((False,)), tmp_path / "net.pt2", example=x)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    small, x = cut()
    file = tmp_path / "net.pt2"
    resect.export(small, file, example=x)
    before = file.read_bytes()
    right = formats.write_pt2

    def slightly_wrong(program, path):
        ran = right(program, path)
        return lambda example: [value + 0.01 * (len(value) == 1) for value in ran(example)]

    monkeypatch.setattr("resect.integrations.export.write_pt2", slightly_wrong)
    with pytest.raises(ProofError, match=r"differs by 0\.01"):
        resect.export(small, file, example=x)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.pt2"]


def test_bad_input(tmp_path):
    small, x = cut()
    with pytest.raises(InputError, match=r"must end in \.onnx or \.pt2"):
        resect.export(small, tmp_path / "net.pth", example=x)
    with pytest.raises(InputError, match=r"must end in \.pt2"):
        resect.export(small, tmp_path / "net.onnx", example=x, format="pt2")
    with pytest.raises(InputError, match=r"Unknown format 'onx'\. Did you mean 'onnx'"):
        resect.export(small, tmp_path / "net.onnx", example=x, format="onx")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(FileError, match="is a folder"):
        resect.export(small, tmp_path / "folder.pt2", example=x)
    with pytest.raises(InputError, match="no tensor with a batch dimension"):
        resect.export(nn.Linear(5, 5), tmp_path / "net.pt2", example=torch.tensor(1.0))
    net = Net((False,))
    with resect.gates(net, resect.find_blocks(net, x)), pytest.raises(AttachError):
        resect.export(net, tmp_path / "net.pt2", example=x)
